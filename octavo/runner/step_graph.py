"""The step graph of a CPU: a model's step recorded once as kernel calls, and replayed from C++ in one call.

Python leaves the step but for its arrays' addresses. The model's own code is what is recorded, on symbols in the place
of tensors; the ops that it calls write themselves down. Sampling is not part of it, and torch is not needed.

Shapes: T tokens, S rows, R sequences, D model width, V vocabulary.
"""

from typing import Any

import numpy as np

from octavo.batch import SENT, Batch, Floats
from octavo.kernels.library import KernelThreads, Step
from octavo.layers.rope import Rope
from octavo.models.decoder import Decoder
from octavo.ops.cpu.calls import Recorder
from octavo.ops.cpu.tape import Recording
from octavo.ops.symbol import TOKENS
from octavo.runner.kernel_cache import KernelCache
from octavo.runner.symbolic import two_tokens

# Rows of logits that are computed at once; more are computed in parts.
_MOST_LOGITS = 256


class StepGraph:
    """A recorded model. Raises `NotRecordableError` if its code computes anything but ops and views."""

    def __init__(
        self, model: Decoder, kv_cache: KernelCache, threads: KernelThreads, max_tokens: int, max_positions: int
    ):
        self.threads = threads
        self._num_tokens = model.config.num_tokens
        self._angles = _Angles(model.rope, max_positions)
        self._step = _record_step(model, kv_cache, threads, max_tokens)
        self._head = _record_head(model, threads)

    def hidden(self, batch: Batch) -> Floats:
        T = batch.num_tokens
        cos_R, sin_R, q_scale = self._angles.of(batch)
        arrays: list[Any] = [np.ascontiguousarray(getattr(batch, each.name), each.dtype) for each in SENT]
        sizes = (T, batch.num_rows, batch.block_tables.shape[1])
        addresses = (array.ctypes.data for array in arrays)
        step = Step(*sizes, *addresses, cos_R.ctypes.data, sin_R.ctypes.data, q_scale)
        self._step.run(self.threads, step)
        return self._step.output[:T]

    def logits(self, hidden_SD: Floats) -> Floats:
        if len(hidden_SD) > _MOST_LOGITS:
            starts = range(0, len(hidden_SD), _MOST_LOGITS)
            return np.concatenate([self.logits(hidden_SD[i : i + _MOST_LOGITS]).copy() for i in starts])
        S = len(hidden_SD)
        self._head.inputs[0][:S] = hidden_SD
        self._head.run(self.threads, Step(tokens=S))
        logits_SV = self._head.output[:S]
        if self._num_tokens:
            logits_SV[:, self._num_tokens :] = -np.inf
        return logits_SV


class _Angles:
    """cos and sin by position for each stretch of the base that is in use, and the factor on queries.

    Tables grow with the positions that come: a long context costs memory only when somebody uses it.
    """

    def __init__(self, rope: Rope, max_positions: int):
        self._rope = rope
        self._max_positions = max_positions
        self._tables: dict[float, tuple[Floats, Floats]] = {}
        self._q_scale = rope.q_scale_table(max_positions)

    def of(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, int]:
        """Addresses of each row's tables, [R] each, and that of the factors, 0 for none."""
        longest = int(batch.seq_lens.max())
        if (batch.ntk_alpha == 1.0).all():
            tables = [self._table(1.0, longest)] * batch.num_rows
        else:
            tables = [self._table(float(alpha), longest) for alpha in batch.ntk_alpha]
        cos = np.array([cos.ctypes.data for cos, _ in tables], np.uint64)
        sin = np.array([sin.ctypes.data for _, sin in tables], np.uint64)
        return cos, sin, 0 if self._q_scale is None else self._q_scale.ctypes.data

    def _table(self, alpha: float, length: int) -> tuple[Floats, Floats]:
        found = self._tables.get(alpha)
        if found is None or len(found[0]) < length:
            found = self._tables[alpha] = self._rope.table(min(self._max_positions, max(1024, 2 * length)), alpha)
        return found


def _record_step(model: Decoder, kv_cache: KernelCache, threads: KernelThreads, max_tokens: int) -> Recording:
    recorder = Recorder(threads)
    hidden_TD: Any = model.forward(two_tokens(model, kv_cache.layers, recorder))
    return Recording(recorder.tape, [], hidden_TD, max_tokens, threads.kernels)


def _record_head(model: Decoder, threads: KernelThreads) -> Recording:
    recorder = Recorder(threads)
    hidden_TD: Any = recorder.tape.new(TOKENS, model.config.hidden_size)
    logits_TV: Any = model.lm_head(hidden_TD, two_tokens(model, [], recorder))
    return Recording(recorder.tape, [hidden_TD], logits_TV, _MOST_LOGITS, threads.kernels)
