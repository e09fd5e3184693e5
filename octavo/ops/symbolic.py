"""The ops on symbols: they compute nothing, and tell a model's code what shapes it gets. Shapes as in `octavo.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.ops.symbol import NotRecordableError, Symbol


class SymbolicOps:
    """Each op gives back new symbols. Raises `NotRecordableError` where it is given what no op has made."""

    def __init__(self) -> None:
        self._num_results = 0

    def _new(self, *shape: int) -> Symbol:
        self._num_results += 1
        return Symbol(self._num_results, np.arange(int(np.prod(shape))).reshape(shape))

    def embedding(self, token_ids_T: Any, weight_VD: Any) -> Symbol:
        return self._new(len(token_ids_T), weight_VD.shape[1])

    def linear(self, x_TI: Any, weight_OI: Any, bias_O: Any = None) -> Symbol:
        _check(x_TI)
        return self._new(len(x_TI), len(weight_OI))

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Symbol:
        _check(x)
        return self._new(*x.shape)

    def add_rms_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Symbol, Symbol]:
        _check(x, residual)
        return self._new(*x.shape), self._new(*x.shape)

    def silu_mul(self, gate_up_T2F: Any) -> Symbol:
        _check(gate_up_T2F)
        return self._new(len(gate_up_T2F), gate_up_T2F.shape[1] // 2)

    def rope_and_cache(self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *rest: Any, **named: Any) -> Symbol:
        _check(q_TNH, k_TKH, v_TKH)
        return self._new(*q_TNH.shape)

    def paged_attention(self, q_TNH: Any, *rest: Any, **named: Any) -> Symbol:
        _check(q_TNH)
        return self._new(*q_TNH.shape)


def _check(*results: Any) -> None:
    for result in results:
        if not isinstance(result, Symbol):
            raise NotRecordableError(f"a tensor of shape {list(result.shape)} was not made by an op")
