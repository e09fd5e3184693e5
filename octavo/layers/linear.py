"""Linear layers: `y = x W^T + b`.

Models see only the `Linear` protocol; how a weight is stored, split over ranks or adapted is a class that
satisfies it. The context is passed so that a layer can find what depends on the rows of a step.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from octavo.layers.context import ForwardContext
from octavo.ops.weight import Weight

if TYPE_CHECKING:
    import torch


class Linear(Protocol):
    def __call__(self, x_TI: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[T, O] in x's dtype."""


class DenseLinear:
    """One weight, dense in the model's dtype or packed for a device's kernels, and its bias."""

    def __init__(self, weight_OI: Weight, bias_O: torch.Tensor | None = None):
        self.weight_OI = weight_OI
        self.bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return ctx.ops.linear(x_TI, self.weight_OI, self.bias_O)
