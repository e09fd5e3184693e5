"""`octavo plan`: its numbers are the loader's, hubs are read by headers alone, and what does not fit says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.checkpoint import open_checkpoint
from octavo.cli import main
from octavo.kernels import library
from octavo.models import read_config
from octavo.models.loader import load_model
from octavo.models.sizes import weight_bytes
from octavo.runner.kv_cache import KVCache
from tests.builds import needs_kernels
from tests.checkpoint.fake_hubs import FakeHub, serving
from tests.tiny_models import save_llama

NAME = "octo/tiny"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = save_llama(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serving(FakeHub(NAME, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
        yield hub


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *words, "--device", "cpu", "--json"])
    return code, json.loads(capsys.readouterr().out)


def tensor_bytes(value: object, seen: dict[int, int]) -> dict[int, int]:
    """Bytes of every tensor reachable from a model, by the address of its memory."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.nbytes
    elif isinstance(value, list | tuple):
        for item in value:
            tensor_bytes(item, seen)
    elif type(value).__module__.startswith("octavo.") and not type(value).__name__.endswith(("Config", "Rope")):
        names = getattr(value, "__dict__", None) or {name: getattr(value, name) for name in type(value).__slots__}
        for item in names.values():
            tensor_bytes(item, seen)
    return seen


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loader_allocates_what_is_planned(tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    checkpoint = open_checkpoint(str(save_llama(tmp_path / "m", **changes)))
    model = read_config(checkpoint.config)
    kind = getattr(torch, dtype)
    # fp32 tensors are views of the mapped file and share its address, so they are copied apart first.
    decoder = load_model(checkpoint, model, torch.float64 if dtype == "float32" else kind, CPU)
    total = sum(tensor_bytes(decoder, {}).values()) // (2 if dtype == "float32" else 1)
    assert weight_bytes(checkpoint.tensors, model, dtype) == total
    cache = KVCache(model, 3, 16, kind, CPU)
    held = sum(layer.k_PBKH.nbytes + layer.v_PBKH.nbytes for layer in cache.layers)
    assert model.kv_bytes_per_token(dtype) * 3 * 16 == held


def test_a_head_that_is_stored_but_tied_is_not_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_llama(tmp_path / "m")))
    model = read_config(checkpoint.config | {"tie_word_embeddings": True})
    whole = weight_bytes(checkpoint.tensors, read_config(checkpoint.config), "float32")
    assert whole - weight_bytes(checkpoint.tensors, model, "float32") == 160 * 64 * 4


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_a_model_on_a_hub_is_read_by_its_headers(
    hub: str, server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, there = plan(capsys, NAME, "--hub", hub)
    assert code == 0
    assert not list((tmp_path / "modelscope").rglob("*.safetensors"))
    assert sum(1 for path in server.asked if path.endswith("model.safetensors")) <= 1
    _, here = plan(capsys, str(tmp_path / "tiny"))
    same = (
        "architecture",
        "parameters",
        "weights",
        "weight_memory",
        "kv_bytes_per_token",
        "max_position",
        "step_memory",
    )
    assert {name: there[name] for name in same} == {name: here[name] for name in same}
    assert there["disk"]["download"] == sum(
        len(content) for name, content in server.files.items() if name != "README.md"
    )
    assert here["disk"]["download"] == 0
    assert there["command"] == f"octavo serve {NAME} --hub {hub} --device cpu"


def test_torch_is_not_needed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from octavo.cli import main; sys.exit(main(['plan', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(save_llama(tmp_path / "m"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "octavo serve" in said
    assert bool(library.builds()) == ("weights in bfloat16 precision" in said)


def test_what_the_kernels_cannot_run_is_said(server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", NAME, "--device", "cpu", "--dtype", "float16"]) == 0
    assert "kernels   none, plain torch runs, much slower: " in capsys.readouterr().out


def test_text_is_for_reading(server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", NAME, "--device", "cpu", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "KV cache  512 bytes a token in float32" in out
    assert out.splitlines()[-1] == f"run: octavo serve {NAME} --dtype float32 --device cpu"


@needs_kernels
def test_a_cache_in_int8_counts_its_scales(server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", NAME, "--device", "cpu", "--kv-cache-dtype", "int8"]) == 0
    # K and V, two layers, two kv heads of 16 numbers and a scale.
    assert f"KV cache  {2 * 2 * 2 * (16 + 4)} bytes a token in int8" in capsys.readouterr().out


def test_a_gguf_file_on_a_hub(
    server: FakeHub, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.checkpoint.remote._GGUF_RANGES", (1 << 20, 2 << 20, 8 << 20))
    server.files = {"smol-Q4_1.gguf": smollm2_path.read_bytes()}
    _, there = plan(capsys, f"{NAME}:Q4_1")
    _, here = plan(capsys, str(smollm2_path))
    assert there["weights"] == here["weights"]
    assert there["disk"]["download"] == smollm2_path.stat().st_size


def test_a_disk_that_is_too_small(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    code, found = plan(capsys, NAME)
    assert code == 1
    assert "set HF_HOME to a folder on another disk" in found["problems"][0]
    assert found["command"] is None


def test_a_memory_that_is_too_small(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.cli.plan.free_ram", lambda: 1000)
    code, found = plan(capsys, NAME)
    assert code == 1
    assert "weights need" in found["problems"][0]


def test_the_table_agrees_with_the_memory(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = plan(capsys, NAME, "--dtype", "float32", "--kv-cache-memory", str(512 * 128 * 5))
    fits = {(cell["context"], cell["requests"]): cell["fits"] for cell in found["table"]}
    assert fits[128, 4]
    assert not fits[128, 16]
    assert fits[32, 16]
    assert found["cached_tokens"] == 128 * 5


def test_a_card_that_one_does_not_own(server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> tuple[int, dict[str, Any]]:
        code = main(["plan", NAME, "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    code, found = told("--memory", "24GiB")
    assert code == 0
    assert (found["device"], found["total_memory"], found["dtype"]) == ("cuda", 24 * 2**30, "bfloat16")
    assert found["memory"] == "a GPU of 24.00 GiB elsewhere"
    assert found["budget"] == int(0.9 * 24 * 2**30)
    code, found = told("--memory", "8GiB", "--device", "cpu")
    assert (found["device"], found["free_memory"], found["memory"]) == ("cpu", 8 * 2**30, "8.00 GiB of RAM elsewhere")
    code, found = told("--memory", "1MiB")
    assert (code, found["fits"]) == (1, False)
    assert main(["plan", NAME, "--memory", "24"]) == 2
    assert "memory is 24, which are bytes; write a unit, as in 24GiB" in capsys.readouterr().err
