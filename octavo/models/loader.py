"""From a checkpoint to a decoder: `load_model`.

Tensors are taken one at a time, dequantized where they are stored in fewer bits, and left in the mapped file
where dtype and device already fit. What a checkpoint holds and nobody asked for is an error: half a model
computes nonsense.
"""

import warnings

import torch

from octavo.checkpoint import Checkpoint
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, nearest
from octavo.layers.quant.gguf import dequantize
from octavo.models import family_of
from octavo.models.decoder import Decoder
from octavo.models.sizes import NOT_WEIGHTS, unused_tensors
from octavo.models.weights import Weights


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """The checkpoint's decoder with weights of `dtype` on `device`.

    `load_format` "dummy" takes random weights of the configuration's shapes instead, which follow from `seed`
    alone. Raises `CheckpointError` for tensors that are missing, of another shape, or left over.
    """
    names = family_of(config.architecture).names
    if load_format == "dummy":
        return Decoder(config, Weights(RandomTensors(dtype, device, seed), names), device)
    source = CheckpointTensors(checkpoint, dtype, device)
    decoder = Decoder(config, Weights(source, names), device)
    source.check_all_taken(unused_tensors(config))
    return decoder


class CheckpointTensors:
    """A checkpoint's tensors in the wanted dtype, on the device; remembers which were taken."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.taken: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
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
        data = _mapped(self.checkpoint, name).to(self.device)
        try:
            return dequantize(data, info.dtype, shape, self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name}: {error}") from None

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


def _mapped(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The tensor's bytes without a copy, unless they lie where no number may start."""
    array = checkpoint.read(name)
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
