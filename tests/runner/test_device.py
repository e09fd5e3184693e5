"""Which device runs, and that a CPU in a GPU's place is told."""

from pathlib import Path

import pytest
import torch

from octavo.runner import device


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver shows of one GPU."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    monkeypatch.setattr(device, "_GPUS", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("gpu")
def test_a_cpu_in_a_gpus_place_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device, "may_have_gpu", lambda: False)
    assert device.choose_device("auto") == "cpu"
    (line,) = caplog.messages
    assert line.startswith("the model runs on the CPU although this machine has NVIDIA H200: no torch for CUDA")
    assert "--device cpu" in line
    caplog.clear()
    assert device.choose_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.choose_device("auto") == "cpu"
    assert not caplog.messages


@pytest.mark.usefixtures("gpu")
def test_a_torch_that_finds_none_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto") == "cpu"
    assert "finds no usable one; see `octavo doctor`" in caplog.messages[0]


def test_nothing_is_told_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "_GPUS", str(tmp_path / "none"))
    monkeypatch.setattr(device, "may_have_gpu", lambda: False)
    assert device.choose_device("auto") == "cpu"
    assert not caplog.messages
