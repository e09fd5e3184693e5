"""From a checkpoint to a decoder: `load_model`.

Tensors are taken one at a time, dequantized where they are stored in fewer bits, and left in the mapped file
where dtype and device already fit. What a checkpoint holds and nobody asked for is an error: half a model
computes nonsense.
"""

import ctypes
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.checkpoint import Checkpoint, TensorInfo
from octavo.checkpoint.mapped import release
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, nearest
from octavo.kernels.weights import Packer, StoredRows
from octavo.layers.quant.gguf import dequantize
from octavo.models import family_of
from octavo.models.decoder import Decoder
from octavo.models.packed import PackedTensors
from octavo.models.quantized import Fp8Tensors
from octavo.models.sizes import NOT_WEIGHTS, unused_tensors
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
    packer: Packer | None = None,
    fp8: bool = False,
) -> Decoder:
    """The checkpoint's decoder with weights of `dtype` on `device`, matrices packed if there is a `packer`, or `fp8`.

    `load_format` "dummy" takes random weights of the configuration's shapes instead, which follow from `seed`
    alone. Raises `CheckpointError` for tensors that are missing, of another shape, or left over.
    """
    names = family_of(config.architecture).names

    def seen(source: "RandomTensors | CheckpointTensors") -> TensorSource:
        if fp8:
            return Fp8Tensors(source, {f"{names['lm_head']}.weight"})
        return PackedTensors(source, packer) if packer else source

    if load_format == "dummy":
        return Decoder(config, Weights(seen(RandomTensors(dtype, device, seed)), names), device)
    source = CheckpointTensors(checkpoint, dtype, device)
    decoder = Decoder(config, Weights(seen(source), names), device)
    source.check_all_taken(unused_tensors(config))
    _return_freed_memory()
    return decoder


class CheckpointTensors:
    """A checkpoint's tensors in the wanted dtype, on the device; remembers which were taken."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.taken: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        info = self.info(name, shape)
        stored = self.checkpoint.read(name)
        try:
            tensor = dequantize(_tensor_of(stored).to(self.device), info.dtype, shape, self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name}: {error}") from None
        if tensor.data_ptr() != stored.ctypes.data:
            release(stored)
        return tensor

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        tensors = [self.tensor(name, (count, in_features)) for name, count in zip(names, rows, strict=True)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self.tensor(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        assert isinstance(table, torch.Tensor)
        return table

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows:
        """The tensor as the file holds it."""
        info = self.info(name, shape)
        return StoredRows(info.dtype, shape, self.checkpoint.read(name))

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """What the checkpoint says of a tensor that is now taken; `CheckpointError` if it is another than expected."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name} is missing.{nearest(name, self.checkpoint.tensors)}"
                " The files are incomplete or config.json belongs to another model"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name} has shape {list(info.shape)}, but config.json makes"
                f" it {list(shape)}; one of the two belongs to another model"
            )
        self.taken.add(name)
        return info

    def check_all_taken(self, ignored: set[str]) -> None:
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in self.taken and name not in ignored and not NOT_WEIGHTS.search(name)
        ]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise CheckpointError(
                f"{self.checkpoint.path}: the model that config.json describes has no place for {len(left)}"
                f" tensors: {', '.join(sorted(left)[:3])}{more}; check num_hidden_layers, the biases and"
                " architectures there"
            )


def _tensor_of(array: NDArray[np.uint8]) -> torch.Tensor:
    """The bytes without a copy, unless they lie where no number may start."""
    if array.ctypes.data % 4:
        array = array.copy()
    with warnings.catch_warnings():
        # A mapped file is read-only, and nobody writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _return_freed_memory() -> None:
    """Has the C library give back what it keeps of the tensors that were joined and converted.

    glibc would keep it, and its users would see a process larger than was planned (docs/decisions/0055).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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

    def rows(self, name: str, shape: tuple[int, int]) -> StoredRows:
        return stored_rows(self.tensor(name, shape))

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        return self.tensor(names[0], (sum(rows), in_features))

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self.tensor(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        assert isinstance(table, torch.Tensor)
        return table
