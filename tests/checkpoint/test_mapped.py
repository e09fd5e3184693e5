"""Mapped files: bytes that stay readable when their memory is given back, and a process as large as was planned."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.checkpoint.mapped import map_file, release

STATUS = Path("/proc/self/status")
on_linux = pytest.mark.skipif(not STATUS.exists(), reason="there is no /proc to read a process's size from")


def file_memory() -> int:
    """Bytes of mapped files that count to this process."""
    found = re.search(r"RssFile:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_released_bytes_are_still_there(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 5_000_000, np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    data = map_file(tmp_path / "file")
    for view in (data, data[1000:4_000_000], data[10:10], data[-1:]):
        release(view)
        assert (data == content).all()
    release(content)  # no view of a mapped file
    assert content.any()


@on_linux
def test_released_bytes_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50_000_000))
    data = map_file(tmp_path / "file")
    before = file_memory()
    assert data.sum() == 0
    assert file_memory() - before > 45_000_000
    release(data[100_000:49_900_000])
    assert file_memory() - before < 5_000_000


# As `octavo plan` counts the weights, against what the process grows by when they are loaded.
GROWTH = r'''
import sys
from pathlib import Path
import torch
from octavo.checkpoint import open_checkpoint
from octavo.models import read_model
from octavo.models.loader import load_model
from octavo.models.sizes import weight_bytes

def resident():
    """Memory of its own and of the model's file; a library's code that is read for the first time is not counted."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counts = len(words) < 6 or words[5].startswith("[") or words[5].endswith(".gguf")
        elif counts and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total

checkpoint = open_checkpoint(sys.argv[1])
config = read_model(checkpoint)
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)  # so that torch's own pages are there
before = resident()
model = load_model(checkpoint, config, torch.float32, torch.device("cpu"))
print(weight_bytes(checkpoint.tensors, config, "float32"), resident() - before)
'''


@on_linux
def test_loading_takes_the_memory_that_is_planned(smollm2_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", GROWTH, str(smollm2_path)], capture_output=True, text=True, check=True, timeout=120
    )
    planned, taken = map(int, ran.stdout.split())
    assert abs(taken / planned - 1) < 0.02
