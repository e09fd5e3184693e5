"""Weights in the kernels' own layout, packed one by one out of the mapped files, without a dequantized copy.

A precision is one of `library.FORMATS`, or `stored`: that of the file, where a quantized type keeps its integers and
scales, bf16 stays bf16, and fp16 becomes fp32.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from octavo.kernels import library
from octavo.kernels.library import Kernels, KernelThreads

_PLAIN = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of weights as a file holds them: `dtype` in the checkpoint's words, `data` their bytes."""

    dtype: str
    shape: tuple[int, int]
    data: NDArray[np.uint8]


class Arena:
    """Memory in one piece, in huge pages where the system has them; taken as it is touched, freed as a whole."""

    def __init__(self, kernels: Kernels, num_bytes: int):
        self._kernels = kernels
        self._size = max(num_bytes, 1)
        self._start: int = kernels.allocate(self._size)
        if not self._start:
            raise MemoryError(f"{num_bytes} bytes of address space cannot be had")
        self.used = 0

    def take(self, num_bytes: int) -> int:
        """The address of `num_bytes` zeroed bytes, aligned to a cache line."""
        address = self._start + self.used
        self.used += -(-num_bytes // 64) * 64
        assert self.used <= self._size, "the arena was made too small"
        return address

    def __del__(self) -> None:
        if getattr(self, "_start", None):
            self._kernels.free(self._start, self._size)


class Piece:
    """Rows of a matrix that are packed alike, from row `first` on; `struct` is what the kernels read."""

    def __init__(self, struct: library.Weight, first: int):
        self.struct = struct
        self.first = first

    @property
    def rows(self) -> int:
        return int(self.struct.outputs)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class PackedWeight:
    """A matrix for the `linear` kernel, [outputs, inputs], in one piece or one for each type that it is stored in."""

    def __init__(self, pieces: list[Piece], shape: tuple[int, int], arena: Arena):
        self.pieces = pieces
        self.shape = shape
        self._arena = arena  # lives as long as the weight


class Packer:
    """Packs matrices into one arena of at most `num_bytes`, all in one precision."""

    def __init__(self, threads: KernelThreads, precision: str, num_bytes: int):
        self._threads = threads
        self._kernels = threads.kernels
        self._precision = precision
        self._arena = Arena(threads.kernels, num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes that the matrices packed so far take."""
        return self._arena.used

    def pack(self, parts: Sequence[StoredRows]) -> PackedWeight:
        """One matrix of rows that are stored in one or several tensors of the same width."""
        width = parts[0].shape[1]
        pieces: list[Piece] = []
        first = 0
        for precision, alike in groupby(parts, self._precision_of):
            piece = self._piece(list(alike), width, precision, first)
            pieces.append(piece)
            first += piece.rows
        return PackedWeight(pieces, (first, width), self._arena)

    def _precision_of(self, part: StoredRows) -> str:
        return _PLAIN.get(part.dtype, part.dtype) if self._precision == "stored" else self._precision

    def _piece(self, parts: list[StoredRows], width: int, precision: str, first: int) -> Piece:
        rows = sum(part.shape[0] for part in parts)
        struct = library.Weight(outputs=rows, inputs=padded(width))
        if precision in library.FORMATS:
            struct.format = library.FORMATS[precision]
            num_bytes = self._kernels.lay_out(ctypes.byref(struct))
        else:
            num_bytes = self._kernels.lay_out_exact(ctypes.byref(struct), library.STORED[precision])
        struct.data = self._arena.take(num_bytes)
        if precision == "int8":
            struct.scale = struct.data + -(-rows // 16) * struct.panel_bytes
        place = 0
        for part in parts:
            assert part.shape[1] == width, "the parts of one matrix have the same inputs"
            dtype, data = library.STORED[part.dtype], part.data.ctypes.data
            self._kernels.pack(self._threads.address, ctypes.byref(struct), place, part.shape[0], dtype, data, width)
            place += part.shape[0]
        return Piece(struct, first)


def padded(width: int) -> int:
    """Inputs as the kernels count them."""
    return -(-width // 32) * 32


# Bytes of a weight with its share of scales and minima, for the types that are kept as they are.
_STORED_BYTES = {
    "Q4_0": 0.5 + 2 / 32,
    "Q4_1": 0.5 + 4 / 32,
    "Q5_0": 1 + 2 / 32,
    "Q5_1": 1 + 4 / 32,
    "Q8_0": 1 + 2 / 32,
    "Q2_K": 0.5 + 8 / 16,
    "Q3_K": 0.5 + 4 / 16,
    "Q4_K": 0.5 + 8 / 32,
    "Q5_K": 1 + 8 / 32,
    "Q6_K": 1 + 4 / 16,
    "float32": 4,
    "bfloat16": 2,
    "int4": 0.5 + 2 / 32,
}


def packed_bytes(dtype: str, rows: int, width: int, precision: str) -> int:
    """Bytes that a matrix stored as `dtype` takes once it is packed, up to rounding to cache lines."""
    if precision == "stored":
        precision = _PLAIN.get(dtype, dtype)
    outputs = -(-rows // 16) * 16
    if precision == "int8":
        return outputs * (-(-width // 64) * 64 + 4)
    return int(outputs * padded(width) * _STORED_BYTES[precision])
