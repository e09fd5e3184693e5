"""`octavo doctor`: a healthy machine, and one of everything that can be wrong."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from octavo.cli import doctor, machine, main
from octavo.kernels import library
from tests.builds import choose

HEALTHY = {"version": "2.9.0", "cuda": None, "threads": 4, "gpus": []}
BROKEN_GPU = {"name": "H100", "error": "CUDA error: uncorrectable ECC"}
GPU = {"name": "H100", "error": None, "free": 70 << 30, "total": 80 << 30, "kernels": "Triton 3.6.0, torch 2.11, sm_90"}


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask_torch", lambda: (HEALTHY, ""))
    monkeypatch.setattr(doctor, "gpus", list)
    for name in doctor._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))


def texts(status: str) -> str:
    return "\n".join(f"{found.text} -> {found.fix}" for found in doctor.examine() if found.status == status)


def test_the_real_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch      " in out
    assert "\nOctavo can run here" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {"area", "status", "text", "fix"} == set(found["findings"][0])


def test_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_TORCH_PROGRAM", "raise ImportError('libcudart.so.12: cannot open')")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "x torch      torch cannot be loaded: ImportError: libcudart.so.12: cannot open\n" in out
    assert "-> pip install torch" in out
    assert "Octavo cannot run here: 1 problem" in out


def test_torch_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_TORCH_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_SECONDS_FOR_TORCH", 0.2)
    assert doctor._ask_torch() == (None, "torch does not answer within 0.2 s")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    assert "numpy is missing -> pip install numpy" in texts("problem")


def test_gpus_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = HEALTHY | {"cuda": "12.8", "gpus": [GPU, BROKEN_GPU]}
    monkeypatch.setattr(doctor, "_ask_torch", lambda: (found, ""))
    assert "1: H100 does not work: CUDA error: uncorrectable ECC" in texts("warning")
    assert "0: H100, 70.00 GiB free of 80.00 GiB" in texts("ok")
    assert "0: kernels: Triton 3.6.0, torch 2.11, sm_90" in texts("ok")


def test_a_gpu_whose_kernels_are_not_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = GPU | {"kernels": "Triton 4.0; without Hopper's attention of prompts, which makes it slower: no such name"}
    monkeypatch.setattr(doctor, "_ask_torch", lambda: (HEALTHY | {"gpus": [slow]}, ""))
    assert "slower: no such name -> pip install a Triton that has them" in texts("warning")


def test_a_gpu_and_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [machine.Gpu(0, "H100", 1, 1, "570.1")])
    assert "torch can use none -> install a CUDA build of torch" in texts("warning")


def test_memory_and_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_ram", lambda: 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    said = texts("warning")
    assert "1.00 GiB free" in said
    assert "set OCTAVO_HOME to a folder on another disk" in said
    assert "set MODELSCOPE_CACHE" in said


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert doctor._port(port).status == "warning"


def test_the_kernels_that_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    if (chosen := library.load()) is not None:
        assert f"{chosen.name} is chosen" in doctor._kernels().text
    choose(monkeypatch, None)
    monkeypatch.setattr(library, "processor", lambda: ({"avx2", "amx_int8", "sse"}, "GenuineIntel"))
    finding = doctor._kernels()
    assert finding.status == "warning"
    assert finding.text.endswith("much slower; this processor has amx_int8, avx2")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._compiler().status == "warning"


def test_variables_are_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("http_proxy", "http://me:word@proxy:8080")
    said = texts("ok")
    assert "HF_TOKEN=(set)" in said
    assert "http_proxy=http://(secret)@proxy:8080" in said
    assert "export no_proxy=localhost,127.0.0.1" in texts("warning")


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "0, NVIDIA H100, 81559, 80000, 570.1\n1, NVIDIA H100, 81559, 1000, 570.1\nbroken line\n"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said))
    assert [gpu.free >> 20 for gpu in machine.gpus()] == [80000, 1000]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.index for gpu in machine.gpus()] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.gpus() == []
