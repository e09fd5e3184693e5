"""What a person sees on stderr while files are fetched: a bar in a terminal, else a line now and then."""

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from octavo.config import format_size

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 15.0


class FetchProgress:
    """A context manager around one fetch of `total` bytes; `origin` reads like "from PyPI"."""

    def __init__(self, name: str, total: int, origin: str, licence: str = ""):
        self.done = 0
        self._name = name
        self._total = total
        self._origin = origin
        self._licence = licence
        self._begin = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __enter__(self) -> "FetchProgress":
        facts = ", ".join(filter(None, (format_size(self._total), self._licence)))
        _say(f"Fetching {self._name} {self._origin} ({facts})")
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task("Fetching", total=self._total)
        return self

    def update(self, done: int) -> None:
        """`done` bytes are there."""
        self.done = min(done, self._total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            _say(f"  {format_size(self.done)} of {format_size(self._total)}")

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more are there. Threads may call it; raises `InterruptedError` after `stop`."""
        with self._lock:
            if self._stopped.is_set():
                raise InterruptedError("the fetch was given up")
            self.update(self.done + num_bytes)

    def stop(self) -> None:
        """Ends the threads that count here."""
        self._stopped.set()

    def pause(self, seconds: float) -> None:
        """Waits before another try; raises `InterruptedError` once there is a `stop`."""
        if self._stopped.wait(seconds):
            raise InterruptedError("the fetch was given up")

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
