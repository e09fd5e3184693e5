"""Token embedding. Shapes: T tokens, V vocabulary, D model width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.layers.context import ForwardContext
from octavo.ops.weight import Table

if TYPE_CHECKING:
    import torch


class Embedding:
    """One row of `weight_VD` a token."""

    def __init__(self, weight_VD: Table):
        self.weight_VD = weight_VD

    def __call__(self, ctx: ForwardContext) -> torch.Tensor:
        """[T, D] of the step's tokens."""
        return ctx.ops.embedding(ctx.token_ids_T, self.weight_VD)
