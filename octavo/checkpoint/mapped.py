"""A file's bytes as a numpy array, mapped and not read.

The mapping is private and writable, because torch warns about arrays that cannot be written; nobody writes,
and a page that stays unwritten is shared with the system's file cache. Knows nothing of formats.
"""

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.errors import CheckpointError

# Without a reservation a file larger than the memory can be mapped; Python names the flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0x40)

# The system maps what its cache holds around a page that is touched, up to a huge page, and so brings back pages that
# were given back before; those go again.
_AROUND = 1 << 21


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of `path` as uint8 [size];

    pages are read from disk when touched. Raises `CheckpointError`.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file, and nothing else is waited for; fetch or copy it again")
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except ValueError:
        raise CheckpointError(f"{path} is empty; fetch or copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return np.frombuffer(mapping, np.uint8)


def release(view: NDArray[np.uint8]) -> None:
    """Gives the memory of a mapped file's part back to the system; what is no view of one is left alone.

    The bytes stay readable: a page that is touched again comes from the file.
    """
    owner: object = view
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not view.size:
        return
    start = view.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, first, start + view.nbytes - first)
