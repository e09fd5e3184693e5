"""A source of tensors that gives matrices packed for the CPU's kernels, straight from the bytes of the file.

Whatever is no matrix (norms, biases) comes from the source underneath; the embedding's rows stay where they are.
"""

from typing import Protocol

import torch

from octavo.checkpoint.mapped import release
from octavo.kernels.weights import Packer, StoredRows
from octavo.ops.weight import Table, Weight


class StoredSource(Protocol):
    """A source that also gives tensors as they are stored."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows: ...


class PackedTensors:
    """`source` seen through `packer`."""

    def __init__(self, source: StoredSource, packer: Packer):
        self._source = source
        self._packer = packer

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._source.tensor(name, shape)

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        parts = [self._source.rows(name, (count, in_features)) for name, count in zip(names, rows, strict=True)]
        return self._pack(parts)

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self._source.rows(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        assert isinstance(table, StoredRows)
        return self._pack([table])

    def _pack(self, parts: list[StoredRows]) -> Weight:
        packed = self._packer.pack(parts)
        for part in parts:
            release(part.data)
        return packed
