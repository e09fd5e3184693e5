"""How far a batch of requests is, as a line on the terminal. Knows nothing of what is counted."""

import sys
import time


class Progress:
    """A line on the terminal while a batch runs: requests done, tokens a second. Silent when it is not a terminal."""

    def __init__(self, total: int, show: bool):
        self.total = total
        self.requests = 0
        self.tokens = 0
        self._visible = show and sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            self._write()
            sys.stderr.write("\n")

    def show(self) -> None:
        if self._visible and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._write()

    def _write(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        sys.stderr.write(
            f"\r{self.requests}/{self.total} requests, {self.tokens:,} tokens, {self.tokens / seconds:,.1f} tokens/s "
        )
        sys.stderr.flush()
