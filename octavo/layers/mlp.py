"""The gated MLP of a decoder layer: `down(silu(gate(x)) * up(x))`. Shapes: T tokens, D model width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.layers.context import ForwardContext
from octavo.layers.linear import Linear

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class GatedMLP:
    """`gate_up` gives gate and up side by side, in this order."""

    gate_up: Linear
    down: Linear

    def __call__(self, x_TD: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.down(ctx.ops.silu_mul(self.gate_up(x_TD, ctx)), ctx)
