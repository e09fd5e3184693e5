"""What a decoder is built from: `Weights` answers in the decoder's words with layers of the right shape.

It translates words to a checkpoint's names, joins what is stored in parts, and keeps count of what was taken.
Where the tensors come from (a checkpoint, or random numbers) is a `TensorSource`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from octavo.layers.linear import DenseLinear, Linear
from octavo.layers.norm import RMSNorm
from octavo.models.family import Names
from octavo.ops.weight import Table, Weight

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """Tensors by the checkpoint's names, in the model's dtype and on its device, or as its kernels take them."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises `CheckpointError` if there is no such tensor or its shape is another."""

    def joined(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        """The vectors `names` of so many numbers each, one behind the other."""

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        """One matrix of the tensors `names`, one below the other, of so many rows each."""

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        """Rows to be looked up one by one."""

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        """The tensor `name` as a matrix, whose rows are given out as `table` already."""


class Weights:
    """A source seen through a family's names, for the whole model or (`of_layer`) one layer."""

    def __init__(self, source: TensorSource, names: Names, layer: int | None = None):
        self.source = source
        self.names = names
        self.layer = layer

    def of_layer(self, layer: int) -> Weights:
        return Weights(self.source, self.names, layer)

    def tensor(self, word: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The one tensor that `word` stands for; `kind` is `weight` or `bias`."""
        (name,) = self._stored(word)
        return self.source.tensor(f"{name}.{kind}", shape)

    def norm(self, word: str, width: int, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(word, "weight", (width,)), eps)

    def linear(self, word: str, parts: tuple[int, ...], in_features: int, bias: bool) -> Linear:
        """A linear layer whose outputs are `parts` side by side, stored in as many tensors or in one."""
        stored = self._stored(word)
        rows = [sum(parts)] if len(stored) == 1 else list(parts)
        weight = self.source.weight([f"{name}.weight" for name in stored], rows, in_features)
        if not bias:
            return DenseLinear(weight)
        return DenseLinear(weight, self.source.joined([f"{name}.bias" for name in stored], rows))

    def table(self, word: str, shape: tuple[int, int]) -> Table:
        """The tensor that `word` stands for, to look up rows in."""
        (name,) = self._stored(word)
        return self.source.table(f"{name}.weight", shape)

    def tied_linear(self, word: str, shape: tuple[int, int], table: Table) -> Linear:
        """A linear layer over the tensor that `word` stands for, which is in use as `table`."""
        (name,) = self._stored(word)
        return DenseLinear(self.source.tied(f"{name}.weight", shape, table))

    def _stored(self, word: str) -> list[str]:
        names = self.names[word]
        return [name.format(i=self.layer) for name in ((names,) if isinstance(names, str) else names)]
