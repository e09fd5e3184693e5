"""Some hundreds of mutants; `scripts/fuzz files` has as many as one wants. And what makes them is itself tested."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import files, mutants, workers

MUTANTS = 300
SECONDS = 60.0  # on a slow machine there are fewer


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "unigram", "wordpiece", "qwen", "gguf", "gguf-sentencepiece"]
)
def test_originals_are_whole(kind: str) -> None:
    """Else every mutant would be refused for the same reason."""
    path = files.originals()[kind]
    files.make_plan(files.engine_options(path))
    files.open_front(path)
    files.answer(path)


@pytest.mark.faults
def test_mutants_are_read_or_refused_in_one_line() -> None:
    """In a process of its own: its workers are forks, which want a process without threads."""
    command = [sys.executable, "-m", "tests.fuzz", "files", "--seed", "20"]
    command += ["--mutants", str(MUTANTS), "--seconds", str(SECONDS)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {MUTANTS} mutants" in done.stdout or "stopped" in done.stdout, done.stdout


def test_a_mutant_is_always_the_same(tmp_path: Path) -> None:
    """Whatever was made before it: a fault is repeated by its number alone."""
    numbers = range(400)
    found = {number: mutants.make(files.originals(), tmp_path / "a", 3, number).what for number in numbers}
    assert len(set(found.values())) > 350
    for number in reversed(numbers):
        assert mutants.make(files.originals(), tmp_path / "b", 3, number).what == found[number]
    again = [mutants.make(files.originals(), tmp_path / name, 3, 0).path for name in "ab"]
    first, second = ((path if path.is_dir() else path.parent) for path in again)
    names = sorted(path.name for path in first.iterdir() if path.is_file())
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def _misbehave(number: int) -> str:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        time.sleep(60)
    if number == 3:
        return workers.fault_of(lambda: bytearray(1 << 40), ValueError)
    if number == 4:
        os._exit(7)
    if number == 5:
        return workers.fault_of(lambda: 1 / 0, ValueError)
    if number == 6:
        return workers.fault_of(lambda: int("x"), ValueError)
    if number == 7:
        raise OSError("no place for a mutant")
    return ""


def test_what_a_worker_does_is_told() -> None:
    found = list(workers.run(_misbehave, range(9), seconds=1.5, more_bytes=1 << 30))
    assert [outcome.number for outcome in found] == list(range(9))
    starts = [
        "",
        "crashes: SIGKILL",
        "hangs",
        "MemoryError",
        "crashes: exit code 7",
        "ZeroDivisionError",
        "",
        "the case itself fails",
        "",
    ]
    for outcome, start in zip(found, starts, strict=True):
        assert outcome.fault.startswith(start), outcome
        assert bool(outcome.fault) == bool(start), outcome


def test_a_run_may_be_left_early() -> None:
    started = workers.run(_misbehave, itertools.repeat(0), seconds=1.5, more_bytes=1 << 30)
    assert next(started).fault == ""
    started.close()
