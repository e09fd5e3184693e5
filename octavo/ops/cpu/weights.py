"""Weights in the kernels' own layout, packed one by one out of the mapped files, without a dequantized copy.

Shapes: V vocabulary, D model width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.ops.cpu import library
from octavo.ops.cpu.library import Kernels


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


class PackedWeight:
    """A matrix for the `linear` kernel, [outputs, inputs]; `struct` is what the kernels read."""

    def __init__(self, struct: library.Weight, shape: tuple[int, int], num_bytes: int, arena: Arena):
        self.struct = struct
        self.shape = shape
        self.num_bytes = num_bytes
        self._arena = arena  # lives as long as the weight

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


def layout(kernels: Kernels, parts: Sequence[tuple[str, int]], in_features: int, precision: str) -> tuple[
    library.Weight, int
]:
    """Layout and bytes of a matrix whose rows come from `parts`, (stored type, rows) each.

    `precision` is one of FORMATS, or `exact`: the parts' own, if they are quantized alike.
    """
    weight = library.Weight(outputs=sum(rows for _, rows in parts), inputs=-(-in_features // 32) * 32)
    types = {dtype for dtype, _ in parts}
    if precision == "exact":
        (dtype,) = types
        return weight, kernels.lay_out_exact(ctypes.byref(weight), library.STORED[dtype])
    weight.format = library.FORMATS[precision]
    return weight, kernels.lay_out(ctypes.byref(weight))


def pack(kernels: Kernels, engine: int, parts: Sequence[StoredRows], precision: str, arena: Arena) -> PackedWeight:
    """One matrix from rows stored in one or several tensors of the same width; see `layout`."""
    in_features = parts[0].shape[1]
    struct, num_bytes = layout(kernels, [(part.dtype, part.shape[0]) for part in parts], in_features, precision)
    struct.data = arena.take(num_bytes)
    if struct.format == library.FORMATS["int8"]:
        struct.scale = struct.data + -(-struct.outputs // 16) * struct.panel_bytes
    first = 0
    for part in parts:
        rows, width = part.shape
        assert width == in_features, "the parts of one matrix have the same inputs"
        kernels.pack(
            engine, ctypes.byref(struct), first, rows, library.STORED[part.dtype], part.data.ctypes.data, width
        )
        first += rows
    return PackedWeight(struct, (first, in_features), num_bytes, arena)
