"""Work that would hold up the event loop, on threads of its own.

Few of them: much of this work holds the interpreter's lock, for which the event loop then waits with each of them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WORKERS = ThreadPoolExecutor(2, "octavo-front")


async def off_loop(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`function` of these arguments, while others use the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, lambda: function(*args, **kwargs))
