"""Peephole fusion: an op may be deferred, and fused into the kernel of the op that consumes its result.

Layers call one op after another and know nothing of it. A deferred op writes nothing at first: it is remembered, and
the next op either fuses it or has it computed. So nothing but an op may look at a result before `finish`, which
`runner/symbolic` checks at load. What is fused:

    rows      deferred op                         consumer
    1 to 2    addition and norm, SiLU             the product behind it (`matvec`)
    2 to 64   a product without bias              the addition and norm behind it (`streamed`)
              a product                           the SiLU behind it (`streamed`)
    3 to 16   a product                           the addition, or the SiLU, behind it (`matmul`)
              a norm whose squares are known      the product behind it
    from 65   a product without bias              the addition behind it (cuBLAS)
    to 64     rotation and cache of single tokens attention (`decode`), unless beginnings are shared

`streamed` is for Hopper; the products beside it are for what it does not take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from octavo.ops import reference
from octavo.ops.triton import TritonOps, matmul, matvec, streamed
from octavo.ops.triton.matmul import Normed
from octavo.ops.triton.norm import write_add_rms_norm, write_rms_norm
from octavo.ops.triton.rope import Heads, write_rope_and_cache
from octavo.ops.triton.silu_mul import write_silu_mul
from octavo.ops.weight import Dense, Fp8Weight, Weight

MOST_TURNED = 64
# Results that were taken in and can still be computed for a second reader: more than a layer has of them.
_KEPT = 8
# Rows from which on cuBLAS adds the residual stream in less time than the norm behind it, as measured in 0083.
LEAST_ADDED = 65


@dataclass(slots=True)
class _Waiting:
    """An op that is still to be computed: by `write` into `result`, or in the kernel of an op that takes it in."""

    result: torch.Tensor
    write: Callable[[], object]
    matvec: Callable[[Dense, torch.Tensor | None], torch.Tensor] | None = None
    norm: Normed | None = None
    product: tuple[torch.Tensor, Normed | None, Dense, torch.Tensor | None] | None = None
    heads: Heads | None = None
    parts: Callable[[], torch.Tensor] | None = None  # [P, T, O], whose sum is the result
    silu: Callable[[], torch.Tensor] | None = None
    add_to: Callable[[torch.Tensor], torch.Tensor] | None = None  # adds the result to a tensor


class FusedOps(TritonOps):
    """`TritonOps` for the layers of one step, whose rows have one token each if they are `singles`.

    After `finish` these ops are as any others.
    """

    def __init__(self, ops: TritonOps, *, singles: bool):
        self.__dict__.update(ops.__dict__)
        self._singles = singles
        self._waiting: _Waiting | None = None
        self._taken: dict[int, _Waiting] = {}  # by memory: what was taken in, for a second reader
        self._going = True

    def finish(self) -> None:
        """Computes what still waits."""
        self._settle()
        self._taken.clear()
        self._going = False

    def _settle(self, *read: torch.Tensor) -> None:
        """Has computed what waits, and what of `read` was only taken in so far."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.write()
        for tensor in read:
            taken = self._taken.pop(_memory(tensor), None)
            if taken is not None:
                taken.write()

    def _take(self, x: torch.Tensor, way: str, *, last: bool = False) -> Any:
        """What `_Waiting` holds for this way of taking it in, if `x` is what waits; `last` if nobody else reads `x`."""
        waiting = self._waiting
        if waiting is None or waiting.result is not x or getattr(waiting, way) is None:
            return None
        self._waiting = None
        if not last:
            self._taken[_memory(x)] = waiting
            if len(self._taken) > _KEPT:
                del self._taken[next(iter(self._taken))]
        return getattr(waiting, way)

    def linear(self, x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(weight_OI, torch.Tensor | Fp8Weight), "packed weights belong to the CPU's kernels"
        if not self._going:
            return super().linear(x_TI, weight_OI, bias_O)
        if isinstance(weight_OI, torch.Tensor) and self._streams(x_TI, weight_OI):
            self._settle(x_TI)
            return self._streamed(x_TI, weight_OI, bias_O)
        if len(x_TI) <= matvec.MOST_ROWS:
            multiply: Callable[..., torch.Tensor] | None = self._take(x_TI, "matvec")
            if multiply:
                return multiply(weight_OI, bias_O)
        elif matmul.suits(len(x_TI), weight_OI):
            norm: Normed | None = self._take(x_TI, "norm")
            self._settle(*(() if norm else (x_TI,)))
            out_TO = x_TI.new_empty(len(x_TI), len(weight_OI))
            self._waiting = _Waiting(
                out_TO,
                lambda: matmul.write_matmul(x_TI, norm, weight_OI, bias_O, out_TO, pdl=self.pdl),
                product=(x_TI, norm, weight_OI, bias_O),
            )
            return out_TO
        self._settle(x_TI)
        if isinstance(weight_OI, torch.Tensor) and bias_O is None and len(x_TI) >= LEAST_ADDED:
            out_TO = x_TI.new_empty(len(x_TI), len(weight_OI))
            self._waiting = _Waiting(
                out_TO,
                lambda: torch.mm(x_TI, weight_OI.t(), out=out_TO),
                add_to=lambda residual: residual.addmm_(x_TI, weight_OI.t()),
            )
            return out_TO
        return super().linear(x_TI, weight_OI, bias_O)

    def _streamed(self, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        out_TO = x_TI.new_empty(len(x_TI), len(weight_OI))
        self._waiting = _Waiting(
            out_TO,
            lambda: streamed.write_product(x_TI, weight_OI, bias_O, out_TO, pdl=self.pdl),
            parts=None if bias_O is not None else lambda: streamed.in_parts(x_TI, weight_OI, pdl=self.pdl),
            silu=lambda: streamed.silu_product(x_TI, weight_OI, bias_O, pdl=self.pdl),
        )
        return out_TO

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(x)
        if product := self._take(x, "product"):
            self._settle(residual)
            x_TI, norm, weight_OI, bias_O = product
            stream, squares_PT = matmul.add_matmul(x_TI, norm, weight_OI, bias_O, residual, pdl=self.pdl)
            self._waiting = _Waiting(
                out, lambda: write_rms_norm(stream, weight, eps, out), norm=Normed(stream, squares_PT, weight, eps)
            )
            return out, stream
        if in_parts := self._take(x, "parts"):
            self._settle(residual)
            stream = torch.empty_like(x)
            write_add_rms_norm(in_parts(), residual, weight, eps, out, stream, pdl=self.pdl)
            return out, stream
        if add_to := self._take(x, "add_to", last=True):
            self._settle(residual)
            stream = add_to(residual)
            write_rms_norm(stream, weight, eps, out)
            return out, stream
        self._settle(x, residual)
        stream = torch.empty_like(x)
        if self._going and len(x) <= matvec.MOST_ROWS:
            self._waiting = _Waiting(
                out,
                lambda: write_add_rms_norm(x, residual, weight, eps, out, stream, pdl=self.pdl),
                matvec=lambda w, b: matvec.norm_matvec(x, residual, weight, eps, stream, w, b, pdl=self.pdl),
            )
        else:
            write_add_rms_norm(x, residual, weight, eps, out, stream, pdl=self.pdl)
        return out, stream

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        if product := self._take(gate_up_T2F, "product"):
            return matmul.silu_matmul(*product, pdl=self.pdl)
        multiply: Callable[[], torch.Tensor] | None = self._take(gate_up_T2F, "silu")
        if multiply:
            return multiply()
        self._settle(gate_up_T2F)
        if not self._going or len(gate_up_T2F) > matvec.MOST_ROWS:
            return super().silu_mul(gate_up_T2F)
        out_TF = gate_up_T2F.new_empty(len(gate_up_T2F), gate_up_T2F.shape[1] // 2)
        self._waiting = _Waiting(
            out_TF,
            lambda: write_silu_mul(gate_up_T2F, out_TF, pdl=self.pdl),
            matvec=lambda w, b: matvec.silu_matvec(gate_up_T2F, w, b, pdl=self.pdl),
        )
        return out_TF

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
        self._settle(q_TNH, k_TKH, v_TKH)
        heads = Heads(q_TNH, k_TKH, v_TKH, cos_Tr, sin_Tr, slots_T, q_scale_T, q_norm_H, k_norm_H, eps)
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        write = lambda: write_rope_and_cache(heads, k_cache_PBKH, v_cache_PBKH, out_TNH, pdl=self.pdl)  # noqa: E731
        if self._going and self._singles and self._prefix is None and len(q_TNH) <= MOST_TURNED:
            self._waiting = _Waiting(out_TNH, write, heads=heads)
        else:
            write()
        return out_TNH

    def paged_attention(self, q_TNH: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if heads := self._take(q_TNH, "heads"):
            return self._attend(q_TNH, *arguments, **(named | {"heads": heads}))
        self._settle(q_TNH)
        return super().paged_attention(q_TNH, *arguments, **named)

    def embedding(self, *arguments: Any) -> torch.Tensor:
        self._settle()
        return reference.embedding(*arguments)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self._settle(x)
        return TritonOps.rms_norm(x, weight, eps)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
