"""The prefix cache on disk: what comes back is what was written, or nothing."""

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
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
    (tmp_path / "notes.kv").write_text("mine too")
    (tmp_path / f"{'0f' * 16}.kv.tmp").write_text("torn by a kill")
    store(tmp_path, files=1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.kv", "notes.txt"]


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


class Clock:
    """`time` for a store, in which a test says how late it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(prefix_store, "time", clock)
    return clock


class FullDisk:
    """Refuses bytes of blocks while `full`, after the file was made; as a disk does whose last block is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.full = True
        self.refused = 0
        inner = prefix_store._header

        def header(key: bytes, content: memoryview) -> bytes:
            if self.full:
                self.refused += 1
                raise OSError(28, "No space left on device")
            return inner(key, content)

        monkeypatch.setattr(prefix_store, "_header", header)


def test_a_full_disk_leaves_no_half_files_and_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    made = filled(tmp_path, 1)
    disk = FullDisk(monkeypatch)
    for attempt, pause in enumerate((60, 120, 240), 1):
        assert made.room
        made.put(b"x", content(9))
        made.flush()
        assert disk.refused == attempt
        assert made.room == 0
        assert not made.has(b"x")
        assert made.num_files == len(list(tmp_path.iterdir())) == 1
        made.put(b"y", content(9))  # while writing pauses the disk is left alone
        made.flush()
        assert disk.refused == attempt
        assert not made.has(b"y")
        clock.now += pause - 1
        assert made.room == 0
        clock.now += 1
    assert caplog.text.count("nothing is written") == 3
    disk.full = False
    made.put(b"x", content(9))
    made.flush()
    np.testing.assert_array_equal(made.read(b"x"), content(9))
    assert made.read(bytes([0])) is not None
    assert made._total == 2 * FILE
    disk.full = True
    made.put(b"z", content(9))
    made.flush()
    clock.now += 60  # the first pause again
    assert made.room


def test_the_pause_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, _ = store(tmp_path), FullDisk(monkeypatch)
    for _ in range(12):
        made.put(b"x", content(9))
        made.flush()
        assert not made.room
        clock.now += 3600
        assert made.room


def test_the_writer_survives_what_nobody_thought_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path)
    monkeypatch.setattr(made, "_evict", lambda coming: 1 / 0)
    for i in range(5):
        made.put(bytes([i]), content(i))
    made.flush()
    assert made.room == 0
    assert made._writer.is_alive()
    made.close()
    assert not made._writer.is_alive()
    assert not list(tmp_path.iterdir())


def test_nobody_waits_for_ever_for_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(prefix_store, "_PATIENCE", 0.05)
    monkeypatch.setattr(prefix_store, "_WAITING", 2 * SIZE)
    made = store(tmp_path)
    monkeypatch.setattr(made, "_evict", lambda coming: answers.wait())
    for i in range(5):
        made.put(bytes([i]), content(i))
    assert made.room == 0
    assert not made.has(bytes([4]))
    made.flush()
    made.close()
    answers.set()
    made._queue.join()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "a" / "cache"))
    filled(folder, 2).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def _link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    # A socket's address is short, so the name is given afterwards.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        shutil.move(f"{folder}/s", path)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD = {"FIFO": os.mkfifo, "link": _link, "link to a device": _link_to_a_device, "folder": _folder, "huge": _huge}
ODD["socket"] = _socket


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["KEY.kv", "KEY.kv.tmp"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.timeout(20)
def test_odd_things_in_a_file_s_place(tmp_path: Path, odd: str, name: str, when: str) -> None:
    """They are passed by: nothing hangs, nothing is read, other blocks are written as ever."""
    (tmp_path / "elsewhere").write_text("somebody's")
    probe = store(tmp_path)
    path = tmp_path / name.replace("KEY.kv", probe._name(b"x"))
    if when == "before":
        try:
            ODD[odd](path)
        except OSError as error:
            pytest.skip(f"this file system has none: {error}")
    made = store(tmp_path)
    if when == "after":
        made.put(b"x", content(9))
        made.flush()
        path.unlink(missing_ok=True)
        try:
            ODD[odd](path)
        except OSError as error:
            pytest.skip(f"this file system has none: {error}")
    if name == "KEY.kv" or when == "before":
        assert made.read(b"x") is None
    made.put(b"x", content(7))
    made.put(b"y", content(8))
    made.flush()
    assert made.room
    np.testing.assert_array_equal(made.read(b"y"), content(8))
    found = made.read(b"x")
    assert found is None or (found == found[0]).all()
    if odd != "folder" and name == "KEY.kv":
        assert found is not None, "it was removed, and the block written in its place"
    assert (tmp_path / "elsewhere").read_text() == "somebody's"
    made.close()


def test_a_file_that_cannot_be_opened_for_the_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path, 1)

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert made.read(bytes([0])) is None
    assert made.read(bytes([0])) is not None


def test_a_half_file_that_another_process_s_start_took_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path)
    inner = Path.replace

    def gone(self: Path, target: Path) -> Path:
        self.unlink()
        return inner(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", gone)
        made.put(b"x", content(1))
        made.flush()
    assert not made.has(b"x")
    assert made.room, "no fault of the disk"


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache_dir is '/proc/cache'.*--prefix-cache-dir"):
        open_folder("/proc/cache")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="prefix_cache_dir"):
        open_folder(str(tmp_path / "file"))


@pytest.mark.parametrize("path", ["~nobody-has-this-name/cache", "a\0b", "x" * 5000])
def test_a_folder_that_can_be_none(path: str) -> None:
    with pytest.raises(ConfigError, match="prefix_cache_dir is"):
        open_folder(path)


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
