"""A checkpoint's tensors as its files hold them, each checked against what a decoder expects, and all of them counted.

What a checkpoint holds and nobody asked for is an error: half a model computes nonsense. No torch here.
"""

import ctypes

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint import Checkpoint
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, nearest
from octavo.models.sizes import NOT_WEIGHTS, unused_tensors


class StoredTensors:
    """The tensors of a checkpoint; remembers which were taken."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._taken: set[str] = set()
        self.path = checkpoint.path

    def take(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """(stored type, bytes); `CheckpointError` if there is no such tensor or it is of another shape."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing.{nearest(name, self._checkpoint.tensors)}"
                " The files are incomplete or config.json belongs to another model"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(info.shape)}, but config.json makes"
                f" it {list(shape)}; one of the two belongs to another model"
            )
        self._taken.add(name)
        return info.dtype, self._checkpoint.read(name)

    def check_all_taken(self, config: ModelConfig) -> None:
        """`CheckpointError` if tensors are left over for which the model has no place."""
        ignored = unused_tensors(config)
        left = [
            name
            for name in self._checkpoint.tensors
            if name not in self._taken and name not in ignored and not NOT_WEIGHTS.search(name)
        ]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise CheckpointError(
                f"{self.path}: the model that config.json describes has no place for {len(left)}"
                f" tensors: {', '.join(sorted(left)[:3])}{more}; check num_hidden_layers, the biases and"
                " architectures there"
            )


def return_freed_memory() -> None:
    """Has the C library give back what it keeps of the tensors that were joined and converted.

    glibc would keep it, and its users would see a process larger than was planned (docs/decisions/0055).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
