"""The ops of the smallest batches: an addition with its norm, or a SiLU, waits until the product that reads it.

Layers call one op after another and know nothing of it. An op that another may take in writes nothing at first: its
result is remembered, and the next op either takes it in or has it computed. So whoever is not an op must not look at
a result before `finish`. Meant for a step while it is recorded as a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from octavo.ops import reference
from octavo.ops.triton import TritonOps
from octavo.ops.triton.matvec import norm_matvec, silu_matvec
from octavo.ops.triton.norm import write_add_rms_norm
from octavo.ops.triton.silu_mul import write_silu_mul
from octavo.ops.weight import Dense, Weight


@dataclass(slots=True)
class _Waiting:
    """`result` is still to be computed: by `product` of it with a weight and a bias, or by `write`."""

    result: torch.Tensor
    product: Callable[[Dense, torch.Tensor | None], torch.Tensor]
    write: Callable[[], None]


class FusedOps(TritonOps):
    """`TritonOps` for steps of so few rows that reading the weights is all that counts."""

    def __init__(self, ops: TritonOps):
        self.__dict__.update(ops.__dict__)
        self._waiting: _Waiting | None = None

    def finish(self) -> None:
        """Computes what still waits."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.write()

    def linear(self, x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        waiting = self._waiting
        if waiting is not None and waiting.result is x_TI:
            assert isinstance(weight_OI, Dense), "packed weights belong to the CPU's kernels"
            self._waiting = None
            return waiting.product(weight_OI, bias_O)
        self.finish()
        return super().linear(x_TI, weight_OI, bias_O)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.finish()
        out, stream = torch.empty_like(x), torch.empty_like(x)
        self._waiting = _Waiting(
            out,
            lambda w, b: norm_matvec(x, residual, weight, eps, stream, w, b, pdl=self.pdl),
            lambda: write_add_rms_norm(x, residual, weight, eps, out, stream, pdl=self.pdl),
        )
        return out, stream

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        self.finish()
        out_TF = gate_up_T2F.new_empty(len(gate_up_T2F), gate_up_T2F.shape[1] // 2)
        self._waiting = _Waiting(
            out_TF,
            lambda w, b: silu_matvec(gate_up_T2F, w, b, pdl=self.pdl),
            lambda: write_silu_mul(gate_up_T2F, out_TF, pdl=self.pdl),
        )
        return out_TF

    def embedding(self, *arguments: Any) -> torch.Tensor:
        self.finish()
        return reference.embedding(*arguments)

    def rms_norm(self, *arguments: Any) -> torch.Tensor:
        self.finish()
        return super().rms_norm(*arguments)

    def rope_and_cache(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.finish()
        return super().rope_and_cache(*arguments, **named)

    def paged_attention(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.finish()
        return super().paged_attention(*arguments, **named)
