"""The prefix cache on disk: what comes back is what was written, or nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from octavo.engine import prefix_store
from octavo.engine.prefix_store import PrefixStore, open_folder
from octavo.errors import ConfigError

SIZE = 64
FILE = SIZE + prefix_store._HEADER


def store(folder: Path, fingerprint: bytes = b"model", size: int = SIZE, files: int = 100) -> PrefixStore:
    return PrefixStore(folder, fingerprint, size, files * (size + prefix_store._HEADER))


def content(i: int, size: int = SIZE) -> np.ndarray:
    return np.full(size, i, np.uint8)


def filled(folder: Path, count: int, **how: int) -> PrefixStore:
    made = store(folder, **how)
    for i in range(count):
        made.put(bytes([i]), content(i))
        made.flush()
    return made


def test_found_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path, 3).close()
    again = store(tmp_path)
    assert again.num_files == 3
    for i in range(3):
        assert again.has(bytes([i]))
        np.testing.assert_array_equal(again.read(bytes([i])), content(i))
    assert not again.has(b"x")
    assert again.read(b"x") is None


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    assert store(tmp_path, b"another").read(bytes([0])) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"",
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"OCTAVOXX" + raw[8:],
        lambda raw: raw[:8] + bytes(16) + raw[24:],
        lambda raw: b"something else altogether",
    ],
)
def test_a_damaged_file_is_removed_and_never_served(tmp_path: Path, damage) -> None:
    filled(tmp_path, 1).close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = store(tmp_path)
    assert again.read(bytes([0])) is None
    assert not path.exists()
    assert not again.has(bytes([0]))
    again.put(bytes([0]), content(7))  # it may be written again
    again.flush()
    np.testing.assert_array_equal(again.read(bytes([0])), content(7))


def test_a_block_under_another_ones_name(tmp_path: Path) -> None:
    made = filled(tmp_path, 2)
    first, second = (tmp_path / made._name(bytes([i])) for i in range(2))
    second.write_bytes(first.read_bytes())
    assert made.read(bytes([1])) is None
    assert not second.exists()


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "half.kv.tmp").write_text("torn by a kill")
    store(tmp_path, files=1).close()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    made = filled(tmp_path, 3, files=3)
    assert made.read(bytes([0])) is not None
    assert made.has(bytes([1]))
    made.put(bytes([3]), content(3))
    made.flush()
    assert [made.has(bytes([i])) for i in range(4)] == [True, True, False, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 3 * FILE


def test_age_outlives_the_process_and_a_smaller_bound_holds_at_once(tmp_path: Path) -> None:
    made = filled(tmp_path, 3)
    for i, age in enumerate((10, 30, 20)):
        os.utime(tmp_path / made._name(bytes([i])), (time.time() - age,) * 2)
    again = store(tmp_path, files=2)
    assert [again.has(bytes([i])) for i in range(3)] == [True, False, True]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_refuses_stops_writing_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    made = filled(tmp_path, 1)

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    made.put(b"x", content(9))
    made.flush()
    assert made.room == 0
    assert not made.has(b"x")
    assert made.read(bytes([0])) is not None


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache_dir is '/proc/cache'.*--prefix-cache-dir"):
        open_folder("/proc/cache")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="prefix_cache_dir"):
        open_folder(str(tmp_path / "file"))


def test_room_for_no_block(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prefix_cache_size is 100 B, less than a block of 64 B"):
        PrefixStore(tmp_path, b"", SIZE, 100)


WRITER = """
import sys, numpy as np
from pathlib import Path
from octavo.engine.prefix_store import PrefixStore
size = 1 << 20
store = PrefixStore(Path(sys.argv[1]), b"model", size, 40 * (size + 100))
print("ready", flush=True)
i = 0
while True:
    store.put(i.to_bytes(4, "big"), np.full(size, i % 251, np.uint8))
    i += 1
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Again and again: what is found afterwards is whole, and the bound holds."""
    size, found = 1 << 20, 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        again = PrefixStore(tmp_path, b"model", size, 40 * (size + 100))
        assert not list(tmp_path.glob("*.tmp"))
        before = again.num_files
        assert 0 < before <= 40
        for i in range(4000):
            name = i.to_bytes(4, "big")
            if again.has(name):
                read = again.read(name)
                assert read is not None, "a file that was given its name is whole"
                assert (read == i % 251).all()
                found += 1
        assert again.num_files == before
        again.close()
    assert found > 4
