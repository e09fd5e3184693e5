"""From a checkpoint to a decoder for the CPU's kernels, without torch: `load_packed`.

Matrices are packed straight from the bytes of the file, the embedding's rows stay where they are, and what is no matrix
(norms, biases) becomes an array of fp32.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint import Checkpoint
from octavo.checkpoint.mapped import release
from octavo.config import ModelConfig, Precision
from octavo.errors import CheckpointError
from octavo.kernels import library
from octavo.kernels.library import Kernels
from octavo.kernels.weights import Packer, StoredRows
from octavo.models import family_of
from octavo.models.decoder import Decoder
from octavo.models.stored import StoredTensors, return_freed_memory
from octavo.models.weights import Weights
from octavo.ops.weight import Table, Weight


def load_packed(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    packer: Packer,
    kernels: Kernels,
    load_format: str = "auto",
) -> Decoder:
    """The checkpoint's decoder, its matrices packed by `packer` in `precision`.

    `load_format` "dummy" takes random weights of the configuration's shapes instead, which come from torch. Raises
    `CheckpointError` for tensors that are missing, of another shape, or left over.
    """
    names = family_of(config.architecture).names
    if load_format == "dummy":
        import torch

        from octavo.models.loader import RandomTensors

        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        random = RandomTensors(dtype, torch.device("cpu"), seed=0)
        return Decoder(config, Weights(PackedTensors(random, packer), names))
    stored = StoredTensors(checkpoint)
    decoder = Decoder(config, Weights(PackedTensors(_CheckpointRows(stored, kernels), packer), names))
    stored.check_all_taken(config)
    return_freed_memory()
    return decoder


class RowSource(Protocol):
    """Where rows and vectors come from."""

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows: ...

    def numbers(self, name: str, size: int) -> NDArray[np.float32]: ...


class PackedTensors:
    """`source` seen through `packer`."""

    def __init__(self, source: RowSource, packer: Packer):
        self._source = source
        self._packer = packer

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """A vector; its readers take any array."""
        assert len(shape) == 1, "matrices are packed"
        return self._source.numbers(name, shape[0])

    def joined(self, names: list[str], sizes: list[int]) -> Any:
        return np.concatenate([self._source.numbers(name, size) for name, size in zip(names, sizes, strict=True)])

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


class _CheckpointRows:
    """A checkpoint's tensors as they are stored; vectors are read by `kernels`."""

    def __init__(self, stored: StoredTensors, kernels: Kernels):
        self._stored = stored
        self._kernels = kernels

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows:
        dtype, data = self._stored.take(name, shape)
        return StoredRows(dtype, shape, data)

    def numbers(self, name: str, size: int) -> NDArray[np.float32]:
        dtype, data = self._stored.take(name, (size,))
        if dtype not in library.STORED:
            known = ", ".join(library.STORED)
            raise CheckpointError(
                f"{self._stored.path}: tensor {name}: weights of type {dtype} cannot be read; known: {known}"
            )
        numbers = np.empty(size, np.float32)
        self._kernels.read_rows(library.STORED[dtype], data.ctypes.data, 1, size, numbers.ctypes.data)
        return numbers
