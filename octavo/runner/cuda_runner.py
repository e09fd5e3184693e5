"""One step on one GPU, submitted without waiting for it: the host is free while the device computes.

Steps run on one stream in the order of their submission. The tokens that a step draws stay on the device, where the
next step may name them (`Batch.token_ids`), and are copied to the host on the side. What the kernels here do not know
(log probabilities, penalties and other rare wishes) goes through `ModelRunner`, which waits.

Shapes: T tokens, R rows, S samples, M blocks of the longest row, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Batch, Ints, SamplingColumns, StepResult
from octavo.config import EngineConfig
from octavo.layers.context import ForwardContext, on_device
from octavo.models.decoder import Decoder
from octavo.ops.triton import TritonOps
from octavo.ops.triton.invariant import segment_for
from octavo.ops.triton.prepare import look_up
from octavo.ops.triton.sampling import MIN_TEMPERATURE, draw
from octavo.runner import noise, sampler
from octavo.runner.cuda_graphs import DecodeGraphs, bucket_of, sampling_arrays
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from octavo.runner.step_inputs import StepInputs

# Results on their way to the host: those of two steps under way, and one that is being read.
_RING = 3


@dataclass(slots=True)
class SubmittedStep:
    """A step whose tokens will lie in `tokens_S`, in pinned memory, once `done` has happened."""

    tokens_S: torch.Tensor
    done: torch.cuda.Event

    def result(self) -> StepResult:
        self.done.synchronize()
        return StepResult(token_ids=self.tokens_S.numpy().copy())


@dataclass(slots=True)
class FinishedStep:
    """A step that was waited for."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class CudaForward:
    """The forward pass, as a graph where there can be one; the `Forward` of this device."""

    def __init__(self, model: Decoder, kv_cache: KVCache, config: EngineConfig):
        self._model = model
        self._kv_cache = kv_cache
        self._ops = TritonOps(model.device, segment_for(config.max_model_len) if config.deterministic else 0)
        self._num_tokens = config.model.num_tokens or config.model.vocab_size
        rows, tokens = bucket_of(config.max_num_seqs), config.max_num_batched_tokens
        self.drawn_S = torch.zeros(rows, dtype=torch.int32, device=model.device)
        self.inputs = StepInputs(4 * tokens + rows * (config.max_blocks_per_seq + 8) + 256, rows, model.device)
        self._graphs = DecodeGraphs(
            model, kv_cache, self._ops, self.inputs, self.drawn_S, config.max_blocks_per_seq, self._draw
        )
        self._ctx: ForwardContext | None = None

    def hidden(self, batch: Batch) -> torch.Tensor:
        if self._graphs.fits(batch):
            self._ctx, hidden_TD = self._graphs.run(batch, draws=False)
            return hidden_TD
        self._ctx = self._context(batch)
        return self._model.forward(self._ctx)

    def draw(self, batch: Batch) -> None:
        """The whole step: the batch's samples, all of them `plain`, are drawn into the beginning of `drawn_S`."""
        if self.holds(batch) or self._graphs.fits(batch):
            self._graphs.run(batch, draws=True)
            return
        ctx = self._context(batch)
        hidden_TD = self._model.forward(ctx)
        if len(batch.sample_index):
            self._draw(ctx, hidden_TD, len(batch.sample_index))

    def holds(self, batch: Batch) -> bool:
        """As `DecodeGraphs.holds`: nothing is to be looked at or moved before `draw`."""
        return self._graphs.holds(batch)

    def _draw(self, ctx: ForwardContext, hidden_TD: torch.Tensor, count: int) -> None:
        index_S, temperature_S, keys_S2 = self.inputs.sampling(count)
        logits_SV = self._model.lm_head(hidden_TD[index_S], ctx)
        draw(logits_SV, keys_S2, temperature_S, self._num_tokens, self.drawn_S)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        assert self._ctx is not None, "logits are those of a step's hidden states"
        return self._model.logits(hidden_SD, self._ctx)

    def _context(self, batch: Batch) -> ForwardContext:
        self._graphs.forget()
        arrays = [batch.token_ids, batch.positions, batch.slots, batch.query_start, batch.seq_lens, batch.block_tables]
        stretched = bool((batch.ntk_alpha != 1.0).any())
        if stretched:
            arrays.append(np.repeat(batch.ntk_alpha, np.diff(batch.query_start)).view(np.int32))
        places = self.inputs.places([array.size for array in arrays])
        self.inputs.send(sampling_arrays(batch), arrays, places)
        given_T, positions_T, slots_T, query_start_R1, seq_lens_R, tables = map(self.inputs.at, places[:6])
        rope = self._model.rope
        cos_Tr, sin_Tr = rope.cos_sin(positions_T, self.inputs.at(places[6], torch.float32) if stretched else None)
        return ForwardContext(
            ops=self._ops,
            caches=self._kv_cache.layers,
            token_ids_T=look_up(given_T, self.drawn_S),
            positions_T=positions_T,
            slots_T=slots_T,
            query_start_R1=query_start_R1,
            seq_lens_R=seq_lens_R,
            block_tables_RM=tables.view(batch.block_tables.shape),
            cos_Tr=cos_Tr,
            sin_Tr=sin_Tr,
            q_scale_T=rope.q_scale(positions_T),
            query_start_host=batch.query_start,
            seq_lens_host=batch.seq_lens,
        )


class CudaRunner:
    """Runs `model` over `kv_cache` with the step sizes of `config`. `waiting` computes steps that are waited for."""

    def __init__(self, model: Decoder, kv_cache: KVCache, config: EngineConfig):
        self._device = model.device
        self._kv_cache = kv_cache
        self._results = [torch.zeros(config.max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._done = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._turn = 0
        # Graphs cannot be recorded on the default stream, and steps keep their order by being on one.
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._forward = CudaForward(model, kv_cache, config)
        draw_tokens = draw_by_row if config.deterministic else sampler.draw
        self.waiting = ModelRunner(model, kv_cache, self._forward, draw_tokens)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> SubmittedStep | FinishedStep:
        """Starts a step. A token id below 0 stands for sample ~id of the step before."""
        with torch.cuda.stream(self._stream):
            if self._forward.holds(batch):
                return self._start(batch)
            if batch.prompt_logprobs is None and plain(batch.sampling):
                self._kv_cache.move_blocks(batch, self.waiting.ops)
                return self._start(batch)
            result = self.waiting.run(batch)
            self._forward.drawn_S[: len(result.token_ids)] = on_device(result.token_ids, self._device)
            return FinishedStep(result)

    @torch.inference_mode()
    def read_blocks(self, blocks_L: Ints) -> NDArray[np.uint8]:
        """As `KVCache.read_blocks`, after the steps that were submitted: one of them may be writing these blocks."""
        with torch.cuda.stream(self._stream):
            return self._kv_cache.read_blocks(blocks_L)

    def _start(self, batch: Batch) -> SubmittedStep:
        self._forward.draw(batch)
        self._turn = (self._turn + 1) % _RING
        S = len(batch.sample_index)
        tokens_S = self._results[self._turn][:S]
        tokens_S.copy_(self._forward.drawn_S[:S], non_blocking=True)
        done = self._done[self._turn]
        done.record(self._stream)
        return SubmittedStep(tokens_S, done)


def draw_by_row(logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """`sampler.Draw` that looks at each row alone: a plain one is drawn as in the steps that nobody waits for."""
    plain_S = _plain_rows(columns)
    tokens_S = sampler.draw(logits_SV, columns) if not plain_S.all() else None
    if not plain_S.any():
        assert tokens_S is not None
        return tokens_S
    device = logits_SV.device
    out_S = torch.empty(len(logits_SV), dtype=torch.int32, device=device)
    keys_S2 = on_device(noise.keys(columns.seed, columns.counter), device)
    draw(logits_SV, keys_S2, on_device(columns.temperature, device), logits_SV.shape[1], out_S)
    return out_S.long() if tokens_S is None else torch.where(on_device(plain_S, device), out_S.long(), tokens_S)


def _plain_rows(columns: SamplingColumns) -> NDArray[np.bool_]:
    """Whether a sample asks for nothing but a temperature in its draw."""
    heat = columns.temperature
    too_cold = (heat > 0) & (heat < MIN_TEMPERATURE)
    return (columns.top_k <= 0) & (columns.top_p >= 1) & (columns.min_p <= 0) & ~too_cold


def plain(columns: SamplingColumns) -> bool:
    """Whether every sample asks for nothing but a temperature, so that it can be drawn without being waited for."""
    return not (
        len(columns.bias_sample)
        or len(columns.allowed_sample)
        or len(columns.penalty_sample)
        or (columns.num_logprobs >= 0).any()
        or not _plain_rows(columns).all()
    )
