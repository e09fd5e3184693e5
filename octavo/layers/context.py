"""The forward context: what layers need of a step besides the activations, as an explicit argument.

Made once a step of its arrays (`octavo.step_layout`), by `ForwardContext.of` on every device. Layers read it and write
only into the caches it holds.

Shapes: T tokens, R rows, M blocks of the longest row, r/2 rotary angles of a head, P blocks, B block size, K
kv heads, H head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.batch import SENT, Batch, Ints
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
    """One step's tensors. The `_host` arrays are the Batch's own and never leave the host.

    `arrays` has all that were sent by their names, those among them that have no name here.
    """

    ops: Ops
    caches: list[LayerCache]
    arrays: Mapping[str, Any]
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
    def of(
        cls,
        arrays: Mapping[str, Any],
        angles: tuple[Any, Any, Any],
        host: tuple[Ints, Ints],
        ops: Ops,
        caches: list[LayerCache],
    ) -> ForwardContext:
        """The context of a step's `arrays`. `angles` are cos, sin and the factor on queries, of each token; `host` are
        query_start and seq_lens as the host has them."""
        cos_Tr, sin_Tr, q_scale_T = angles
        query_start_host, seq_lens_host = host
        return cls(
            ops=ops,
            caches=caches,
            arrays=arrays,
            token_ids_T=arrays["token_ids"],
            positions_T=arrays["positions"],
            slots_T=arrays["slots"],
            query_start_R1=arrays["query_start"],
            seq_lens_R=arrays["seq_lens"],
            block_tables_RM=arrays["block_tables"],
            cos_Tr=cos_Tr,
            sin_Tr=sin_Tr,
            q_scale_T=q_scale_T,
            query_start_host=query_start_host,
            seq_lens_host=seq_lens_host,
        )

    @classmethod
    def build(
        cls, batch: Batch, caches: list[LayerCache], rope: Rope, ops: Ops, device: torch.device
    ) -> ForwardContext:
        """The context of `batch`; the rotary angles are computed here, once for all layers."""
        arrays = {each.name: on_device(getattr(batch, each.name), device) for each in SENT}
        alpha_T = None
        if (batch.ntk_alpha != 1.0).any():
            alpha_T = on_device(np.repeat(batch.ntk_alpha, np.diff(batch.query_start)), device)
        angles = rope.angles(arrays["positions"], alpha_T)
        return cls.of(arrays, angles, (batch.query_start, batch.seq_lens), ops, caches)
