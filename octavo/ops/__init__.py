"""The kernels of a step: what each computes (`Ops`), and which module computes it on a device (`for_device`).

An op is a function with the same flat arguments on every device; a device's kernels are a module of such
functions. Ops know shapes and numbers, and nothing of models, requests or schedules. The chosen module
travels in the ForwardContext, so that whoever wants to record a step puts a recorder in its place.

Shapes: T tokens, R rows, D model width, F MLP width, N query heads, K kv heads, H head width, P blocks, B
block size, M blocks of the longest row, V vocabulary, C block copies, r rotary width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from octavo.batch import Ints
from octavo.ops.weight import Table, Weight

if TYPE_CHECKING:
    import torch


class Ops(Protocol):
    """What the kernels of every device promise; `ops/reference.py` is the oracle for the others."""

    def embedding(self, token_ids_T: torch.Tensor, weight_VD: Table) -> torch.Tensor:
        """Rows of `weight_VD`, one a token: [T, D]."""

    def linear(self, x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + b`, [T, O], in x's dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32, rounded to x's dtype."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rms_norm(x + residual), x + residual)`: the next sublayer's input, and the residual stream.

        `x` and `residual` are given away: the sum may stand in the memory of either, and nobody reads them again.
        """

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, [T, F]; the gate is the first half of each row."""

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
        """Rotates q and k, writes k and v into their slots (block * B + offset); returns the q, [T, N, H].

        An int8 cache is [P, B, K, H + 4]: each head has 127 for its largest element, and behind it its fp32 scale.

        Before all that, each head of q and k passes `rms_norm` by `q_norm_H` and `k_norm_H`, if there are such weights.

        `cos_Tr` and `sin_Tr` are fp32 and hold r/2 angles: the first r elements of a head rotate, element i
        with element i + r/2; the rest pass unchanged. `q_scale_T`, in fp32, multiplies each token's whole q.
        """

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
        """Causal attention of each row's queries over its cached keys, [T, N, H]; chunks and single tokens.

        The keys of a query at position p are those at positions 0 to p, or only the last `sliding_window` of
        them if that is above 0; the cache holds them already, this step's own included. `soft_cap` above 0
        bounds the scores by `soft_cap * tanh(score / soft_cap)`. Softmax is in fp32. The `_host` arrays are
        the same numbers as their namesakes, there to choose shapes by without waiting for the device.
        """

    def copy_blocks(self, caches: list[torch.Tensor], copies_C2: torch.Tensor) -> None:
        """Copies blocks (source, destination) in each [P, B, K, H] cache; all reads go before all writes."""


def described(device: torch.device) -> str:
    """One line of what computes on a GPU."""
    if find_spec("triton") is None:
        return f"torch {torch.__version__} without Triton, which is much slower; pip install triton"
    from octavo.ops.triton import hopper_kernels

    return hopper_kernels.described(device)


def for_device(device: torch.device) -> Ops:
    """The kernels that run on `device`: Triton's on a GPU where it is installed, else plain torch."""
    if device.type == "cuda" and find_spec("triton"):
        from octavo.ops.triton import TritonOps

        return TritonOps(device)
    from octavo.ops import reference

    return reference
