"""From a checkpoint to a decoder in torch: `load_model`; `packed` makes one for the CPU's kernels.

Tensors are taken one at a time, dequantized where they are stored in fewer bits, and left in the mapped file
where dtype and device already fit.
"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.checkpoint import Checkpoint
from octavo.checkpoint.mapped import release
from octavo.config import ModelConfig
from octavo.errors import CheckpointError
from octavo.kernels.weights import StoredRows
from octavo.layers.quant.gguf import dequantize
from octavo.models import family_of
from octavo.models.decoder import Decoder
from octavo.models.quantized import Fp8Tensors
from octavo.models.stored import StoredTensors, return_freed_memory
from octavo.models.weights import TensorSource, Weights
from octavo.ops.cpu.calls import stored_rows
from octavo.ops.weight import Table, Weight


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    fp8: bool = False,
) -> Decoder:
    """The checkpoint's decoder with weights of `dtype` on `device`, its matrices in `fp8` if that is asked for.

    `load_format` "dummy" takes random weights of the configuration's shapes instead, which follow from `seed`
    alone. Raises `CheckpointError` for tensors that are missing, of another shape, or left over.
    """
    names = family_of(config.architecture).names

    def seen(source: "RandomTensors | CheckpointTensors") -> TensorSource:
        if fp8:
            return Fp8Tensors(source, {f"{names['lm_head']}.weight"})
        return source

    if load_format == "dummy":
        return Decoder(config, Weights(seen(RandomTensors(dtype, device, seed)), names), device)
    source = CheckpointTensors(checkpoint, dtype, device)
    decoder = Decoder(config, Weights(seen(source), names), device)
    source.stored.check_all_taken(config)
    return_freed_memory()
    return decoder


class CheckpointTensors:
    """A checkpoint's tensors in the wanted dtype, on the device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.stored = StoredTensors(checkpoint)
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored_type, stored = self.stored.take(name, shape)
        try:
            tensor = dequantize(_tensor_of(stored).to(self.device), stored_type, shape, self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.stored.path}: tensor {name}: {error}") from None
        if tensor.data_ptr() != stored.ctypes.data:
            release(stored)
        return tensor

    def joined(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        return torch.cat([self.tensor(name, (size,)) for name, size in zip(names, sizes, strict=True)])

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        tensors = [self.tensor(name, (count, in_features)) for name, count in zip(names, rows, strict=True)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self.tensor(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        assert isinstance(table, torch.Tensor)
        return table


def _tensor_of(array: NDArray[np.uint8]) -> torch.Tensor:
    """The bytes without a copy, unless they lie where no number may start."""
    if array.ctypes.data % 4:
        array = array.copy()
    with warnings.catch_warnings():
        # A mapped file is read-only, and nobody writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class RandomTensors:
    """Random tensors of small scale: matrices and biases around 0, norms around 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        tensor.uniform_(-0.03, 0.03, generator=self.generator)
        return tensor.add_(1.0) if len(shape) == 1 and name.endswith(".weight") else tensor

    def joined(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        return self.tensor(names[0], (sum(sizes),))

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows:
        """The tensor as a file would hold it."""
        return stored_rows(self.tensor(name, shape))

    def numbers(self, name: str, size: int) -> NDArray[np.float32]:
        """A vector in fp32."""
        return self.tensor(name, (size,)).float().numpy()

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        return self.tensor(names[0], (sum(rows), in_features))

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self.tensor(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        assert isinstance(table, torch.Tensor)
        return table
