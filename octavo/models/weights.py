"""What a decoder is built from: `Weights` answers in the decoder's words with layers of the right shape.

It translates words to a checkpoint's names, joins what is stored in parts, and keeps count of what was taken.
Where the tensors come from (a checkpoint, or random numbers) is a `TensorSource`.
"""

from typing import Protocol

import torch

from octavo.layers.linear import DenseLinear, Linear
from octavo.layers.norm import RMSNorm
from octavo.models.family import Names


class TensorSource(Protocol):
    """Tensors by the checkpoint's names, in the model's dtype and on its device."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises `CheckpointError` if there is no such tensor or its shape is another."""


class Weights:
    """A source seen through a family's names, for the whole model or (`of_layer`) one layer."""

    def __init__(self, source: TensorSource, names: Names, layer: int | None = None):
        self.source = source
        self.names = names
        self.layer = layer

    def of_layer(self, layer: int) -> "Weights":
        return Weights(self.source, self.names, layer)

    def tensor(self, word: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The one tensor that `word` stands for; `kind` is `weight` or `bias`."""
        (name,) = self._stored(word)
        return self.source.tensor(f"{name}.{kind}", shape)

    def norm(self, word: str, width: int, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(word, "weight", (width,)), eps)

    def linear(self, word: str, parts: tuple[int, ...], in_features: int, bias: bool) -> Linear:
        """A linear layer whose outputs are `parts` side by side, stored in as many tensors or in one."""
        return DenseLinear(
            self._joined(word, "weight", parts, (in_features,)),
            self._joined(word, "bias", parts, ()) if bias else None,
        )

    def tied_linear(self, weight_OI: torch.Tensor) -> Linear:
        """A linear layer over a weight that belongs to another layer."""
        return DenseLinear(weight_OI)

    def _joined(self, word: str, kind: str, parts: tuple[int, ...], rest: tuple[int, ...]) -> torch.Tensor:
        stored = self._stored(word)
        if len(stored) == 1:
            parts = (sum(parts),)
        tensors = [
            self.source.tensor(f"{name}.{kind}", (size, *rest)) for name, size in zip(stored, parts, strict=True)
        ]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _stored(self, word: str) -> list[str]:
        names = self.names[word]
        return [name.format(i=self.layer) for name in ((names,) if isinstance(names, str) else names)]
