"""Which kernels in Gluon are used under which Triton; `tests/gpu` runs the check itself."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it is"),
]
GPU = torch.device("cuda:0")
RIGHT = {"attention": "", "streamed": ""}


class Asked:
    """In place of a check: what it says, and how often it was asked."""

    def __init__(self) -> None:
        self.times = 0
        self.says: tuple[dict[str, str] | None, str] = (RIGHT, "")

    def __call__(self, device: torch.device) -> tuple[dict[str, str] | None, str]:
        self.times += 1
        return self.says


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """A Hopper GPU under a version of Triton that was not measured."""
    from octavo.ops.triton import hopper_kernels

    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hopper_kernels, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(hopper_kernels.triton, "__version__", "3.99.1")
    hopper_kernels.usable.cache_clear()
    yield hopper_kernels
    hopper_kernels.usable.cache_clear()


@pytest.fixture
def asked(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(kernels, "_ask", made)
    return made


def start(kernels: ModuleType) -> str:
    """What a process says that starts now."""
    kernels.usable.cache_clear()
    return kernels.described(GPU)


def test_a_measured_version_is_not_checked(kernels: ModuleType, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels.triton, "__version__", "3.6.7")
    said = start(kernels)
    assert "for Hopper attention of prompts and products whose weights stream (measured with Triton 3.6)" in said
    assert asked.times == 0


def test_other_gpus_have_none(kernels: ModuleType, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "capability", lambda device: (8, 6))
    assert start(kernels).endswith(", sm_86")
    assert kernels.usable(GPU).attention == "this is no Hopper GPU (sm_90)"
    assert asked.times == 0


def test_another_version_is_checked_once(kernels: ModuleType, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    for _ in range(3):
        assert "(checked on this GPU under Triton 3.99.1)" in start(kernels)
        assert kernels.usable(GPU).streamed == kernels.usable(GPU).attention == ""
    assert asked.times == 1
    monkeypatch.setattr(kernels.triton, "__version__", "3.99.2")
    start(kernels)
    assert asked.times == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    start(kernels)
    assert asked.times == 3


def test_what_is_wrong_is_not_used(kernels: ModuleType, asked: Asked):
    asked.says = ({"attention": "results differ by 1.0e+00", "streamed": ""}, "")
    for _ in range(2):
        said = start(kernels)
        assert "for Hopper products whose weights stream (checked" in said
        assert "without Hopper's attention of prompts, which makes it slower: results differ by 1.0e+00" in said
    assert asked.times == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attention": ""}', '{"attention": "", "streamed": 5}', "\0\xff"])
def test_a_damaged_result_is_made_anew(kernels: ModuleType, asked: Asked, content: str):
    start(kernels)
    (place,) = Path(os.environ["OCTAVO_HOME"], "kernels").iterdir()
    place.write_text(content, encoding="latin-1")
    assert "(checked on this GPU" in start(kernels)
    assert asked.times == 2
    start(kernels)
    assert asked.times == 2


def test_a_check_that_says_nothing_is_made_again(kernels: ModuleType, asked: Asked):
    asked.says = None, "no result within 300 s"
    for times in (1, 2):
        assert "slower: they could not be checked: no result within 300 s" in start(kernels)
        assert asked.times == times
    asked.says = RIGHT, ""
    assert "(checked on this GPU" in start(kernels)


def test_a_folder_that_cannot_be_written(kernels: ModuleType, asked: Asked):
    Path(os.environ["OCTAVO_HOME"]).write_text("a file where the folder should be")
    for times in (1, 2):
        assert "(checked on this GPU" in start(kernels)
        assert asked.times == times


def test_the_process_that_checks_has_no_gpu(kernels: ModuleType):
    said, why = kernels._ask(GPU)
    assert said is None
    assert "cuda" in why.lower()


def test_a_triton_without_gluon(kernels: ModuleType, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    import sys

    import octavo.ops.triton

    monkeypatch.delattr(octavo.ops.triton, "hopper")
    monkeypatch.setitem(sys.modules, "octavo.ops.triton.hopper", None)
    assert "slower: Triton 3.99.1 lacks what they need: import of octavo.ops.triton.hopper halted" in start(kernels)
    assert asked.times == 0


# ---- what Triton reads of the environment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"HOME": "{}/home"}, None),
        ({"HOME": "{}/home", "TRITON_CACHE_DIR": "{}/named"}, "{}/named"),
        ({"HOME": "{}/file", "OCTAVO_HOME": "{}/octavo"}, "{}/octavo/triton"),
        ({"HOME": "{}/file", "OCTAVO_HOME": "{}/octavo", "TRITON_HOME": "{}/home"}, None),
        ({"HOME": "{}/file", "OCTAVO_HOME": "{}/file"}, "octavo-triton-"),
    ],
    ids=str,
)
def test_a_folder_for_compiled_kernels(
    given: dict[str, str], folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from octavo.ops.triton import environment

    (tmp_path / "file").write_text("")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "OCTAVO_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    environment.settle()
    found = os.environ.get("TRITON_CACHE_DIR")
    assert (found is None) if folder is None else folder.format(tmp_path) in (found or "")
