"""The forward context: what layers need of a step besides the activations, as an explicit argument.

Built once a step from a Batch. Layers read it and write only into the caches it holds.

Shapes: T tokens, R rows, M blocks of the longest row, r/2 rotary angles of a head, P blocks, B block size, K
kv heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.batch import Batch, Ints
from octavo.layers.rope import Rope
from octavo.ops import Ops
from octavo.ops.transfer import on_device

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class LayerCache:
    """The paged K and V of one layer: tensors of the device, or arrays of the CPU's kernels."""

    k_PBKH: Any
    v_PBKH: Any


@dataclass(slots=True)
class ForwardContext:
    """One step's tensors. The `_host` arrays are the Batch's own and never leave the host."""

    ops: Ops
    caches: list[LayerCache]
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_start_R1: torch.Tensor
    seq_lens_R: torch.Tensor
    block_tables_RM: torch.Tensor
    cos_Tr: torch.Tensor
    sin_Tr: torch.Tensor
    q_scale_T: torch.Tensor | None  # for models whose queries grow with their position; None for all others
    query_start_host: Ints
    seq_lens_host: Ints

    @classmethod
    def build(
        cls, batch: Batch, caches: list[LayerCache], rope: Rope, ops: Ops, device: torch.device
    ) -> ForwardContext:
        """The context of `batch`; the rotary angles are computed here, once for all layers."""
        positions_T = on_device(batch.positions, device)
        alpha_T = None
        if (batch.ntk_alpha != 1.0).any():
            alpha_T = on_device(np.repeat(batch.ntk_alpha, np.diff(batch.query_start)), device)
        cos_Tr, sin_Tr = rope.cos_sin(positions_T, alpha_T)
        return cls(
            ops=ops,
            caches=caches,
            token_ids_T=on_device(batch.token_ids, device),
            positions_T=positions_T,
            slots_T=on_device(batch.slots, device),
            query_start_R1=on_device(batch.query_start, device),
            seq_lens_R=on_device(batch.seq_lens, device),
            block_tables_RM=on_device(batch.block_tables, device),
            cos_Tr=cos_Tr,
            sin_Tr=sin_Tr,
            q_scale_T=rope.q_scale(positions_T),
            query_start_host=batch.query_start,
            seq_lens_host=batch.seq_lens,
        )
