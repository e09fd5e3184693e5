"""The kernels of an NVIDIA GPU, in Triton; large matrix products are cuBLAS', which torch brings.

Compiled when they are first used, and kept on disk by Triton. Shapes and meanings stand in `octavo.ops.Ops`.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from octavo.batch import Ints
from octavo.ops import reference
from octavo.ops.triton import environment, fp8, hopper_kernels, matmul, matvec, product, tiles
from octavo.ops.triton.decode import PrefixParts, decode_attention
from octavo.ops.triton.invariant import invariant_attention
from octavo.ops.triton.norm import add_rms_norm, rms_norm
from octavo.ops.triton.prefill import prefill_attention
from octavo.ops.triton.rope import Heads, rope_and_cache
from octavo.ops.triton.shared import shared_attention
from octavo.ops.triton.silu_mul import silu_mul
from octavo.ops.weight import Fp8Weight, Weight

try:
    from octavo.ops.triton import streamed
except ImportError:  # `hopper_kernels` says why
    streamed = None  # type: ignore[assignment]

_COUNTERS = 4096

environment.settle()


@dataclass(slots=True)
class SharedPrefix:
    """Which rows of a step have their first keys in the same blocks; see `shared.shared_attention`."""

    lengths_R: torch.Tensor
    tile_start_L: torch.Tensor
    tile_rows_L: torch.Tensor


class TritonOps:
    """The ops of one device, and the memory that their programs meet in.

    With a `segment` (see `invariant.segment_for`) a token's results have the same bits whatever else a step computes.
    `may_fuse` is off for a model whose code reads results between the ops, which `FusedOps` may not have computed yet.
    """

    embedding = staticmethod(reference.embedding)
    rms_norm = staticmethod(rms_norm)
    copy_blocks = staticmethod(reference.copy_blocks)

    def __init__(self, device: torch.device, segment: int = 0):
        self._segment = segment
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._prefix: SharedPrefix | None = None
        self.may_fuse = not segment
        self._hopper = hopper_kernels.usable(device)
        # Whether a kernel may be launched before the one in front of it has ended (programmatic dependent launch).
        self.pdl = tiles.capability(device) >= (9, 0)

    @property
    def invariant(self) -> bool:
        return self._segment > 0

    def sharing(self, prefix: "SharedPrefix") -> "TritonOps":
        """These ops for steps of single tokens, in which some rows share a beginning."""
        ops = copy(self)
        ops._prefix = prefix
        return ops

    def _shared(
        self,
        q_RNH: torch.Tensor,
        k_cache_PBKH: torch.Tensor,
        v_cache_PBKH: torch.Tensor,
        block_tables_RM: torch.Tensor,
        scale: float,
        soft_cap: float,
    ) -> PrefixParts:
        prefix = self._prefix
        assert prefix is not None
        return shared_attention(
            q_RNH,
            k_cache_PBKH,
            v_cache_PBKH,
            block_tables_RM,
            prefix.lengths_R,
            prefix.tile_start_L,
            prefix.tile_rows_L,
            scale,
            soft_cap,
        )

    def linear(self, x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(weight_OI, torch.Tensor | Fp8Weight), "packed weights belong to the CPU's kernels"
        if self.invariant:
            return product.product(x_TI, weight_OI, bias_O)
        if isinstance(weight_OI, torch.Tensor) and self._streams(x_TI, weight_OI):
            return streamed.product(x_TI, weight_OI, bias_O, pdl=self.pdl)
        if len(x_TI) <= matvec.MOST_ROWS:
            return matvec.matvec(x_TI, weight_OI, bias_O, pdl=self.pdl)
        if matmul.suits(len(x_TI), weight_OI):
            return matmul.matmul(x_TI, weight_OI, bias_O, pdl=self.pdl)
        if isinstance(weight_OI, Fp8Weight):
            way = fp8.linear if fp8.suits(x_TI, weight_OI) else product.product
            return way(x_TI, weight_OI, bias_O)
        return reference.linear(x_TI, weight_OI, bias_O)

    def _streams(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
        return not self._hopper.streamed and streamed.suits(x_TI, weight_OI)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, weight, eps, pdl=self.pdl)

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up_T2F, pdl=self.pdl)

    def rope_and_cache(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        cos_Tr: torch.Tensor,
        sin_Tr: torch.Tensor,
        k_cache_PBKH: torch.Tensor,
        v_cache_PBKH: torch.Tensor,
        slots_T: torch.Tensor,
        q_scale_T: torch.Tensor | None = None,
        q_norm_H: torch.Tensor | None = None,
        k_norm_H: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        return rope_and_cache(
            *(q_TNH, k_TKH, v_TKH, cos_Tr, sin_Tr, k_cache_PBKH, v_cache_PBKH, slots_T),
            *(q_scale_T, q_norm_H, k_norm_H, eps),
            pdl=self.pdl,
            invariant=self.invariant,
        )

    def paged_attention(
        self,
        q_TNH: torch.Tensor,
        k_cache_PBKH: torch.Tensor,
        v_cache_PBKH: torch.Tensor,
        query_start_R1: torch.Tensor,
        seq_lens_R: torch.Tensor,
        block_tables_RM: torch.Tensor,
        positions_T: torch.Tensor,
        query_start_host: Ints,
        seq_lens_host: Ints,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        """The leading rows with one query each go to the decode kernel, all others to the prefill kernel."""
        return self._attend(
            *(q_TNH, k_cache_PBKH, v_cache_PBKH, query_start_R1, seq_lens_R, block_tables_RM, positions_T),
            *(query_start_host, seq_lens_host, scale, sliding_window, soft_cap),
        )

    def _attend(
        self,
        q_TNH: torch.Tensor,
        k_cache_PBKH: torch.Tensor,
        v_cache_PBKH: torch.Tensor,
        query_start_R1: torch.Tensor,
        seq_lens_R: torch.Tensor,
        block_tables_RM: torch.Tensor,
        positions_T: torch.Tensor,
        query_start_host: Ints,
        seq_lens_host: Ints,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        heads: Heads | None = None,
    ) -> torch.Tensor:
        """With `heads` these stand for `q_TNH`, and all rows have one query each."""
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        singles = leading_singles(query_start_host)
        if self.invariant:
            caches, how = (k_cache_PBKH, v_cache_PBKH), (self._segment, scale, sliding_window, soft_cap)
            rows = seq_lens_R[:singles], block_tables_RM[:singles]
            if singles:
                invariant_attention(q_TNH, *caches, None, *rows, out_TNH, singles, *how)
            rows = seq_lens_R[singles:], block_tables_RM[singles:]
            if singles < len(seq_lens_host):
                count = int(query_start_host[-1]) - singles
                invariant_attention(q_TNH, *caches, query_start_R1[singles:], *rows, out_TNH, count, *how)
            return out_TNH
        if singles:
            decode_attention(
                q_TNH[:singles],
                k_cache_PBKH,
                v_cache_PBKH,
                seq_lens_R[:singles],
                block_tables_RM[:singles],
                out_TNH,
                self._counters,
                scale,
                sliding_window,
                soft_cap,
                self._shared(q_TNH, k_cache_PBKH, v_cache_PBKH, block_tables_RM, scale, soft_cap)
                if self._prefix and not sliding_window
                else None,
                heads,
                pdl=self.pdl,
            )
        if singles < len(seq_lens_host):
            prefill_attention(
                q_TNH,
                k_cache_PBKH,
                v_cache_PBKH,
                query_start_R1[singles:],
                seq_lens_R[singles:],
                block_tables_RM[singles:],
                out_TNH,
                int(query_start_host[-1]) - singles,
                scale,
                sliding_window,
                soft_cap,
                self._turn,
            )
        return out_TNH


def leading_singles(query_start: Ints) -> int:
    """How many rows at the beginning have exactly one token."""
    others = np.flatnonzero(query_start != np.arange(len(query_start)))
    return int(others[0]) - 1 if len(others) else len(query_start) - 1
