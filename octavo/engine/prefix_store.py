"""The prefix cache's tier on disk: blocks that nobody uses any more, in files that outlive the process.

A file holds the bytes of one block, opaque here, under a key made of the block's chain hash and of a fingerprint of all
that its bytes depend on: weights, arithmetic, layout. It carries its key and a checksum; what does not bear them out is
removed and never served. Writing is a thread's work. Decides nothing about blocks; knows no tensors.

    KEY.kv   [ "OCTAVOKV" | key, 16 bytes | checksum of key and bytes, 16 | the block's bytes ]
"""

import contextlib
import hashlib
import os
import queue
import threading
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


def open_folder(path: str) -> Path:
    """The folder `path`, made if need be; raises `ConfigError` if nothing can be written there."""
    folder = Path(path).expanduser()
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"prefix_cache_dir is {path!r}, where nothing can be written ({error.strerror}); make it writable or name"
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
        self._failed = False
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
        """Blocks that `put` takes now without waiting, and that should be taken at once."""
        if self._failed:
            return 0
        return min(max(1, _AT_ONCE // self._block_bytes), self._queue.maxsize - self._queue.qsize())

    def has(self, block_hash: bytes) -> bool:
        """Whether a block is here or on its way; it counts as used."""
        return self._touch(self._name(block_hash))

    def put(self, block_hash: bytes, content: Bytes) -> None:
        """Lets the writer write a block; waits while it has too much to do (see `room`)."""
        name = self._name(block_hash)
        with self._lock:
            if name in self._sizes:
                return
            self._sizes[name] = 0  # counted when it is written
        self._queue.put((name, content))

    def read(self, block_hash: bytes) -> Bytes | None:
        """A block's bytes, if they are here and whole."""
        name = self._name(block_hash)
        path = self._folder / name
        try:
            stored = path.read_bytes()
        except OSError:
            self._remove(name)
            return None
        key, content = bytes.fromhex(path.stem), memoryview(stored)[_HEADER:]
        if len(content) != self._block_bytes or stored[:_HEADER] != _header(key, content):
            logger.warning("prefix cache: %s is damaged or not a block of this model; it is removed", path)
            self._remove(name)
            return None
        self._touch(name)
        with contextlib.suppress(OSError):
            os.utime(path)
        return np.frombuffer(content, np.uint8)

    def flush(self) -> None:
        """Waits until all that was put is written."""
        self._queue.join()

    def close(self) -> None:
        """Writes what was put and ends the thread."""
        self._queue.put(None)
        self._writer.join()

    # ---- files ------------------------------------------------------------------------------------------------

    def _name(self, block_hash: bytes) -> str:
        return hashlib.blake2b(self._fingerprint + block_hash, digest_size=16).hexdigest() + ".kv"

    def _scan(self) -> None:
        """Takes in the files that are there. Files of other names are somebody else's and stay as they are."""
        for torn in self._folder.glob("*.kv.tmp"):
            torn.unlink(missing_ok=True)  # its writer was killed; one that lives will find it gone, and go on
        found = []
        for path in self._folder.glob("*.kv"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.name, path.stat().st_size))
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self._total = sum(self._sizes.values())
        self._evict(0)

    def _touch(self, name: str) -> bool:
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
                return True
            return False

    def _remove(self, name: str) -> None:
        with self._lock:
            self._total -= self._sizes.pop(name, 0)
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

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            name, content = item
            try:
                self._write(name, content)
            except OSError as error:
                self._remove(name)
                if not self._failed:
                    logger.warning("prefix cache: nothing more is written to %s: %s", self._folder, error)
                self._failed = True
            self._queue.task_done()
        self._queue.task_done()

    def _write(self, name: str, content: Bytes) -> None:
        """Whole or not at all, whenever this process is killed: the name is given when the bytes are there."""
        size = _HEADER + content.nbytes
        self._evict(size)
        half = self._folder / f"{name}.tmp"
        with half.open("wb") as file:
            file.write(_header(bytes.fromhex(name.removesuffix(".kv")), content.data))
            file.write(content.data)
        half.replace(self._folder / name)
        with self._lock:
            self._total += size - self._sizes.get(name, 0)
            self._sizes[name] = size
            self.num_written += 1


def _header(key: bytes, content: memoryview) -> bytes:
    checksum = hashlib.blake2b(key, digest_size=16)
    checksum.update(content)
    return _MAGIC + key + checksum.digest()
