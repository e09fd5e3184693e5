"""Signal handlers that wait while an engine is at work.

A handler of Python's may raise, as Ctrl-C does, between any two operations of the main thread: in the middle of a step
that would leave the engine between two states. While `DeferredSignals` is entered, handlers are only noted, and run
where `deliver` is called, or at the end.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]

# Those that programs handle. A handler of the system's, which ends the process, needs no deferring.
_NUMBERS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF")
    if hasattr(signal, name)
)


class DeferredSignals:
    """A context that may be entered within itself; in any thread but the main one, where no handler runs, it does
    nothing."""

    def __init__(self) -> None:
        self._depth = 0
        self._handlers: dict[int, _Handler] = {}
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():
            self._depth += 1
            if self._depth == 1:
                for number in _NUMBERS:
                    handler = signal.getsignal(number)
                    if callable(handler) and handler != self._note:
                        self._handlers[number] = handler
                        signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if self._depth == 0:
            try:
                self._restore()
            finally:
                self._restore()  # a handler that is back may have raised before the others were
            self.deliver()

    def deliver(self) -> None:
        """Runs the handlers that were noted, as if their signals came now; one of them may raise."""
        if self._noted and threading.current_thread() is threading.main_thread():
            number, frame = self._noted.pop(0)
            try:
                self._handlers[number](number, frame)
            finally:
                self.deliver()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._noted.append((number, frame))
        else:
            self._handlers[number](number, frame)
