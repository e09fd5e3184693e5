"""RMSNorm (Zhang and Sennrich 2019), alone or fused with the residual stream that runs beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.layers.context import ForwardContext

if TYPE_CHECKING:
    import torch


class RMSNorm:
    """Norm over the last dimension; `eps` is added to the mean square."""

    def __init__(self, weight: torch.Tensor, eps: float):
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return ctx.ops.rms_norm(x, self.weight, self.eps)

    def add(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the stream with `x_TD` added, the stream); without a stream, `x_TD` starts it."""
        if residual_TD is None:
            return self(x_TD, ctx), x_TD
        return ctx.ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)
