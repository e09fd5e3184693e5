"""What cannot run is told before its weights are fetched, by each command; and what a file is that is no model's."""

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM
from octavo.checkpoint import open_checkpoint
from octavo.cli import main
from octavo.errors import CheckpointError, OctavoError
from octavo.swift.models import locate as locate_for_swift
from tests.checkpoint.fake_hubs import FakeHub, serving
from tests.checkpoint.test_hubs import safetensors
from tests.tiny_models import save_llama

NAME = "octo/tiny.1"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "USE_HF", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    folder = save_llama(tmp_path / "tiny")
    with serving(FakeHub(NAME, {path.name: path.read_bytes() for path in folder.iterdir()})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
        yield hub


def change(server: FakeHub, **fields: object) -> None:
    server.files["config.json"] = json.dumps(json.loads(server.files["config.json"]) | fields).encode()


def gguf(architecture: str) -> bytes:
    """A file of a header alone, and a hole of weights behind it."""
    text = [b"general.architecture", architecture.encode()]
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(text[0])) + text[0]
    return header + struct.pack("<IQ", 8, len(text[1])) + text[1] + bytes(100_000)


WRONG = [
    ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not supported"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantized by 'gptq'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_nothing_is_fetched_that_cannot_run(
    hub: str, fields: dict, words: str, server: FakeHub, tmp_path: Path
) -> None:
    change(server, **fields)
    size = len(server.files["model.safetensors"])
    with pytest.raises(OctavoError, match=words):
        LLM(NAME, hub=hub, device="cpu")
    assert all(int(wanted.rpartition("-")[2]) < size // 2 for wanted in server.ranges), "the header alone"
    assert not [*tmp_path.glob("hf/**/model*"), *tmp_path.glob("modelscope/**/model*")]


def test_every_command_says_so(
    server: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    change(server, architectures=["MambaForCausalLM"])
    for words in (
        ["serve", NAME, "--port", "0"],
        ["pull", NAME],
        ["pull", NAME, "--update"],
        ["chat", NAME, "--device", "cpu"],
        ["infer", "--model", NAME, "--template_type", "chatml"],
        ["deploy", "--model", NAME, "--port", "0"],
        ["parity", NAME],
        ["plan", NAME],
    ):
        assert main(words) == 2, words
        assert "architecture 'MambaForCausalLM' is not supported" in capsys.readouterr().err
    with pytest.raises(OctavoError, match="MambaForCausalLM"):
        locate_for_swift(None, NAME)


def test_types_that_are_not_read(server: FakeHub) -> None:
    server.files["model.safetensors"] = safetensors(weight=[64, 64]).replace(b'"F32"', b'"I32"')
    with pytest.raises(CheckpointError, match="stored as I32, which Octavo does not read; take the original model"):
        open_and_check()
    server.files = {"tiny.Q8_0.gguf": gguf("mamba")}
    with pytest.raises(CheckpointError, match="has architecture 'mamba'; Octavo reads GGUF files of"):
        open_and_check()


def open_and_check() -> None:
    from octavo.models import check_runnable

    open_checkpoint(NAME, hub="hf", check=check_runnable)


def test_what_can_run_is_fetched(server: FakeHub) -> None:
    open_and_check()
    assert [wanted for wanted in server.ranges if not wanted.startswith("bytes=0-")] == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Please log in</body></html>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (PAGE, "a web page, such as a login or a proxy sends"),
        (b"PK\x03\x04" + b"x" * 100, "a zip archive, such as PyTorch's pickles"),
        (b"\x1f\x8b\x08" + b"x" * 100, "packed with gzip"),
        (bytes(1000), "nothing but zeros"),
    ],
)
def test_what_stands_in_for_a_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tiny")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(str(folder))
        (folder / name).unlink() if whole is None else (folder / name).write_bytes(whole)
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(tmp_path / "model.gguf"))
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(tmp_path / "model"))


def test_files_that_are_no_whole_model(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tiny")
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match="one file of a model; name the folder around it"):
            open_checkpoint(str(folder / name))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        open_checkpoint(str(tmp_path / "pytorch_model.bin"))
