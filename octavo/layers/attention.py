"""Self-attention of one layer over the paged cache: qkv, rope and cache write, attention, output.

Shapes: T tokens, D model width, N query heads, K kv heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.layers.context import ForwardContext
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Attention:
    """`qkv` gives a token's N query, K key and K value heads side by side; the norms are by head."""

    qkv: Linear
    o: Linear
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    sliding_window: int = 0

    def __call__(self, x_TD: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        heads = self.qkv(x_TD, ctx).view(len(x_TD), -1, self.head_dim)
        q_TNH = heads[:, : self.num_heads]
        k_TKH, v_TKH = heads[:, self.num_heads :].chunk(2, dim=1)
        cache = ctx.caches[self.layer]
        q_TNH = ctx.ops.rope_and_cache(
            q_TNH,
            k_TKH,
            v_TKH,
            ctx.cos_Tr,
            ctx.sin_Tr,
            cache.k_PBKH,
            cache.v_PBKH,
            ctx.slots_T,
            ctx.q_scale_T,
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.q_norm.eps if self.q_norm else 0.0,
        )
        out_TNH = ctx.ops.paged_attention(
            q_TNH,
            cache.k_PBKH,
            cache.v_PBKH,
            ctx.query_start_R1,
            ctx.seq_lens_R,
            ctx.block_tables_RM,
            ctx.positions_T,
            ctx.query_start_host,
            ctx.seq_lens_host,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
        )
        return self.o(out_TNH.flatten(1), ctx)
