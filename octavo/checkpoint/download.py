"""One file over the network, continued where a broken connection or an interrupted run left it, and checked.

What arrives gathers in a `.part` beside its place, which gets its name when size and SHA-256 are right. How a file is
asked for is the hub's business.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.fetch_progress import FetchProgress
from octavo.errors import DownloadError

MOST_TRIES = 5  # in a row without a new byte
PAUSE = 1.0  # seconds before the second try; then twice as long each time


class Interrupted(Exception):  # noqa: N818 -- no error yet: it is tried again
    """The connection broke, or the server is busy."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """An answer: whether it begins where it was asked to (a server may ignore that), and its pieces.

    Reading them raises `Interrupted`.
    """

    goes_on: bool
    pieces: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Download:
    """`num_bytes` to `target`; `sha256` is empty where the hub tells none.

    `read_from` asks for the file from a byte on; it raises `Interrupted`, or a `DownloadError` if trying again is of no
    use. `failed` and `differs` make the errors for a person: of the last interruption, of another SHA-256.
    """

    target: Path
    num_bytes: int
    sha256: str
    read_from: Callable[[int], AbstractContextManager[Arriving]]
    failed: Callable[[Exception], DownloadError]
    differs: Callable[[str], DownloadError]

    @property
    def part(self) -> Path:
        """Where the file grows: another version of it has another part."""
        version = "" if self.sha256 in ("", self.target.name) else f".{self.sha256[:12]}"
        return self.target.with_name(f"{self.target.name}{version}.part")

    def num_there(self) -> int:
        """Bytes that need not come again."""
        if self._is_here():
            return self.num_bytes
        return min(self.part.stat().st_size, self.num_bytes) if self.part.is_file() else 0

    def _is_here(self) -> bool:
        """Whether the file was fetched whole; one of another version is not it."""
        if not self.target.is_file() or self.target.stat().st_size != self.num_bytes:
            return False
        return not self.sha256 or self._sha256(self.target) == self.sha256

    @staticmethod
    def _sha256(path: Path) -> str:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def run(self, progress: FetchProgress) -> None:
        """Raises `DownloadError`; what has come then stays for the next run."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        before = self.num_there()
        progress.advance(before)
        if self.target.is_file():
            if before == self.num_bytes and self._is_here():
                return
            self.target.unlink()
        tries = 0
        while (interrupted := self._continue(progress)) is not None:
            tries = 1 if self.num_there() > before else tries + 1
            before = self.num_there()
            if tries >= MOST_TRIES:
                raise self.failed(interrupted)
            progress.pause(PAUSE * 2 ** (tries - 1))
        with self.part.open("rb") as content:
            os.fsync(content.fileno())
        if self.sha256 and (found := self._sha256(self.part)) != self.sha256:
            self.part.unlink()
            raise self.differs(found)
        self.part.replace(self.target)

    def _continue(self, progress: FetchProgress) -> Exception | None:
        """Fetches what the part lacks; why that did not work, if trying again may help."""
        have = self.part.stat().st_size if self.part.exists() else 0
        if have > self.num_bytes:
            self.part.unlink()
            have = 0
        if have == self.num_bytes and self.part.exists():
            return None
        try:
            with self.read_from(have) as arriving, self.part.open("ab" if arriving.goes_on else "wb") as output:
                if not arriving.goes_on:
                    progress.advance(-have)
                for piece in arriving.pieces:
                    output.write(piece)
                    progress.advance(len(piece))
                    if output.tell() > self.num_bytes:
                        break  # whoever sends more than was listed may send for ever
        except Interrupted as error:
            return error.__cause__ if isinstance(error.__cause__, Exception) else error
        size = self.part.stat().st_size
        if size == self.num_bytes:
            return None
        return ConnectionError(f"{self.target.name} ended at byte {size} of {self.num_bytes}")
