"""Work that would hold up the event loop, on threads of its own.

Few of them: much of this work holds the interpreter's lock, for which the event loop then waits with each of them. It
gives the lock away with each call to the system, and gets it back after `SWITCH_SECONDS` at the latest, if it is not in
a library that keeps it for longer.
"""

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

SWITCH_SECONDS = 0.0005  # Python's own are ten times that, for each of the half dozen calls of a short answer
_WORKERS = ThreadPoolExecutor(2, "octavo-front", lambda: sys.setswitchinterval(SWITCH_SECONDS))


class _Uncollected:
    """Python's search for cycles stands still in it.

    It takes 100 ms, with the interpreter's lock, among the hundreds of thousands of objects of a large request or
    answer, which have none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            gc.disable()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                gc.enable()


uncollected = _Uncollected()


async def off_loop(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`function` of these arguments, while others use the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, lambda: function(*args, **kwargs))
