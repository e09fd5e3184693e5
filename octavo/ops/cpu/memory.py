"""Memory for the kernels: arrays that begin on a cache line, and the addresses of arrays and tensors alike."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_CACHE_LINE = 64


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros whose pages the system makes when they are first touched, so that memory is taken as it is used."""
    num_bytes = prod(shape) * np.dtype(dtype).itemsize
    whole = np.zeros(num_bytes + _CACHE_LINE, np.uint8)
    start = -whole.ctypes.data % _CACHE_LINE
    return whole[start : start + num_bytes].view(dtype).reshape(shape)


def address_of(array: Any) -> int:
    """Where the numbers of an array or of a tensor begin."""
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    return address
