"""The prefix cache's tier on disk: blocks that nobody uses any more, in files that outlive the process.

A file holds the bytes of one block, opaque here, under a key made of the block's chain hash and of a fingerprint of all
that its bytes depend on: weights, arithmetic, layout. It carries its key and a checksum; what does not bear them out is
removed and never served. Writing is a thread's work. Decides nothing about blocks; knows no tensors.

    KEY.kv   [ "OCTAVOKV" | key, 16 bytes | checksum of key and bytes, 16 | the block's bytes ]

The engine goes on whatever the disk does: when it refuses (it may be full) or stalls, nothing is written for a while,
and then it is tried again. Files hold what users wrote, so they are for their owner alone.
"""

import contextlib
import errno
import hashlib
import os
import queue
import re
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.config import format_size
from octavo.errors import ConfigError
from octavo.log import logger

Bytes = NDArray[np.uint8]

_MAGIC = b"OCTAVOKV"
_HEADER = len(_MAGIC) + 32
# Bytes that may wait for the disk, and that are taken out of the cache after one step.
_WAITING = 64 * 1024**2
_AT_ONCE = 2 * 1024**2
# Seconds without writing after the disk refused: the first time, and at most, since each refusal doubles them.
_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0
# Seconds that anybody waits for the writer.
_PATIENCE = 10.0

_OWN_NAME = re.compile(r"[0-9a-f]{32}\.kv(\.tmp)?")
# A file that stands in nobody's place: no link is followed, and nothing that blocks is waited for.
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OF_THE_MOMENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)


def open_folder(path: str) -> Path:
    """The folder `path`, made for its owner alone if need be; raises `ConfigError` if nothing can be written there."""
    try:
        folder = Path(path).expanduser()
        probe = folder / f".{os.getpid()}.tmp"
        folder.mkdir(0o700, parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)
        os.close(os.open(probe, _WRITING, 0o600))
        probe.unlink()
    except (OSError, RuntimeError, ValueError) as error:  # the latter two: the home of nobody, a zero in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"prefix_cache_dir is {path!r}, where nothing can be written ({why}); make it writable or name"
            " another with --prefix-cache-dir"
        ) from None
    return folder


class PrefixStore:
    """Blocks of `block_bytes` bytes in `folder`, together at most `max_bytes` with those of other models there.

    When room is short the least recently used files go, whichever model they are of; a file's time of change is its
    last use. Raises `ConfigError` if `max_bytes` does not hold one block.
    """

    def __init__(self, folder: Path, fingerprint: bytes, block_bytes: int, max_bytes: int):
        self.num_written = 0
        self._folder = folder
        self._fingerprint = fingerprint
        self._block_bytes = block_bytes
        self._max_bytes = max_bytes
        if max_bytes < block_bytes + _HEADER:
            raise ConfigError(
                f"prefix_cache_size is {format_size(max_bytes)}, less than a block of {format_size(block_bytes)};"
                " raise --prefix-cache-size"
            )
        self._pause = _PAUSE  # after the next refusal
        self._resume_at = 0.0  # on the monotonic clock; nothing is written before
        self._lock = threading.Lock()  # over the two below, which the writer changes too
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of files, or blocks to be files; least recently used first
        self._total = 0
        self._scan()
        self._queue: queue.Queue[tuple[str, Bytes] | None] = queue.Queue(max(1, _WAITING // block_bytes))
        self._writer = threading.Thread(target=self._write_all, name="octavo-prefix-store", daemon=True)
        self._writer.start()

    # ---- the engine's side ------------------------------------------------------------------------------------

    @property
    def num_files(self) -> int:
        return len(self._sizes)

    @property
    def room(self) -> int:
        """Blocks that `put` takes now without waiting, and that should be taken at once; 0 while writing pauses."""
        if self._pausing:
            return 0
        return min(max(1, _AT_ONCE // self._block_bytes), self._queue.maxsize - self._queue.qsize())

    def has(self, block_hash: bytes) -> bool:
        """Whether a block is here or on its way; it counts as used."""
        return self._touch(self._name(block_hash))

    def put(self, block_hash: bytes, content: Bytes) -> None:
        """Lets the writer write a block; waits while it has too much to do (see `room`), but not for ever.

        A block that comes while writing pauses, or that the disk has no time or place for, is forgotten.
        """
        name = self._name(block_hash)
        with self._lock:
            if name in self._sizes:
                return
            self._sizes[name] = 0  # counted when it is written
        try:
            self._queue.put((name, content), timeout=_PATIENCE)
        except queue.Full:
            self._forget(name)
            self._refused("it does not answer")

    def read(self, block_hash: bytes) -> Bytes | None:
        """A block's bytes, if they are here and whole."""
        name = self._name(block_hash)
        path, size = self._folder / name, _HEADER + self._block_bytes
        try:
            with os.fdopen(os.open(path, _READING), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                # The size first: what lies there may be larger than the memory.
                stored = file.read(size) if stat.S_ISREG(found.st_mode) and found.st_size == size else b""
                if stored:
                    os.utime(file.fileno())
        except OSError as error:
            if error.errno not in _OF_THE_MOMENT:
                self._remove(name)
            return None
        content = memoryview(stored)[_HEADER:]
        if len(stored) != size or stored[:_HEADER] != _header(bytes.fromhex(path.stem), content):
            logger.warning("prefix cache: %s is damaged or not a block of this model; it is removed", path)
            self._remove(name)
            return None
        self._touch(name)
        return np.frombuffer(content, np.uint8)

    def flush(self) -> None:
        """Waits until all that was put is written, as long as the writer gets on with it."""
        left = -1
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks and self._queue.unfinished_tasks != left:
                left = self._queue.unfinished_tasks
                self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, _PATIENCE)
        if self._queue.unfinished_tasks:
            self._refused("it does not answer")

    def close(self) -> None:
        """Writes what was put and ends the thread, unless the disk does not answer."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_PATIENCE)
            self._writer.join(_PATIENCE)

    # ---- files ------------------------------------------------------------------------------------------------

    def _name(self, block_hash: bytes) -> str:
        return hashlib.blake2b(self._fingerprint + block_hash, digest_size=16).hexdigest() + ".kv"

    def _scan(self) -> None:
        """Takes in the files that are there. What has another name, or is no file, is somebody else's and stays."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not _OWN_NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                        continue
                    if entry.name.endswith(".tmp"):
                        Path(entry).unlink()  # its writer was killed; one that lives will find it gone, and go on
                        continue
                    about = entry.stat(follow_symlinks=False)
                    found.append((about.st_mtime_ns, entry.name, about.st_size))
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self._total = sum(self._sizes.values())
        self._evict(0)

    def _touch(self, name: str) -> bool:
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
                return True
            return False

    def _forget(self, name: str) -> None:
        with self._lock:
            self._total -= self._sizes.pop(name, 0)

    def _remove(self, name: str) -> None:
        self._forget(name)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _evict(self, coming: int) -> None:
        """Removes the least recently used files until `coming` bytes fit."""
        while self._total + coming > self._max_bytes:
            with self._lock:
                oldest = next((name for name, size in self._sizes.items() if size), None)
            if oldest is None:
                return
            self._remove(oldest)

    @property
    def _pausing(self) -> bool:
        return time.monotonic() < self._resume_at

    def _refused(self, why: object) -> None:
        """Nothing is written for a while."""
        with self._lock:
            if self._pausing:
                return
            pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._resume_at = time.monotonic() + pause
        logger.warning("prefix cache: nothing is written to %s for %.0f s: %s", self._folder, pause, why)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            name, content = item
            try:
                if self._pausing or not self._write(name, content):
                    self._forget(name)
            except Exception as error:  # whatever it is, blocks that wait must not wait for ever
                self._forget(name)
                self._refused(error)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, name: str, content: Bytes) -> bool:
        """Whole or not at all, whenever this process is killed: the name is given when the bytes are there.

        False if something else lies in the place of this one block, which is no fault of the disk.
        """
        size = _HEADER + content.nbytes
        self._evict(size)
        half = self._folder / f"{name}.tmp"
        try:
            handle = os.open(half, _WRITING, 0o600)
        except FileExistsError:
            return False  # another process writes the same block; or it is no file
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_header(bytes.fromhex(name.removesuffix(".kv")), content.data))
                file.write(content.data)
            half.replace(self._folder / name)
        except (FileNotFoundError, IsADirectoryError):
            half.unlink(missing_ok=True)
            return False
        except BaseException:
            with contextlib.suppress(OSError):
                half.unlink()
            raise
        with self._lock:
            self._total += size - self._sizes.get(name, 0)
            self._sizes[name] = size
            self.num_written += 1
            self._pause = _PAUSE
        return True


def _header(key: bytes, content: memoryview) -> bytes:
    checksum = hashlib.blake2b(key, digest_size=16)
    checksum.update(content)
    return _MAGIC + key + checksum.digest()
