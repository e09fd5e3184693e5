"""One step on one GPU, submitted without waiting for it: the host is free while the device computes.

Steps run on one stream in the order of their submission. The tokens that a step draws stay on the device, where the
next step may name them (`Batch.token_ids`), and are copied to the host on the side. What the kernels here do not know
(log probabilities, penalties and other rare wishes) goes through `ModelRunner`, which waits.

Shapes: T tokens, R rows, S samples, M blocks of the longest row, V vocabulary.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Batch, Ints, NextStep, SamplingColumns, StepResult
from octavo.config import EngineConfig
from octavo.layers.context import ForwardContext, on_device
from octavo.models.decoder import Decoder
from octavo.ops.triton import TritonOps
from octavo.ops.triton.invariant import segment_for
from octavo.ops.triton.prepare import look_up, publish
from octavo.ops.triton.sampling import MIN_TEMPERATURE, Asked, draw
from octavo.runner import noise, sampler
from octavo.runner.cuda_graphs import DecodeGraphs, bucket_of
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from octavo.runner.prompt_graphs import PromptGraphs, most_rows, room_for
from octavo.runner.step_buffers import TURNS, StepBuffers


@dataclass(slots=True)
class SubmittedStep:
    """A step whose tokens will be in `token_ids`, until a later step writes there, once `done` has happened."""

    token_ids: Ints
    done: torch.cuda.Event

    def result(self) -> StepResult:
        self.done.synchronize()
        return StepResult(self.token_ids.copy())


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
        rows = bucket_of(most_rows(config.max_num_seqs))
        tokens = room_for(config.max_num_batched_tokens) + rows
        self.drawn_S = torch.zeros(rows, dtype=torch.int32, device=model.device)
        self._buffers = StepBuffers(4 * tokens + rows * (config.max_blocks_per_seq + 8) + 256, rows, model.device)
        common = (model, kv_cache, self._ops, self._buffers, self.drawn_S, config)
        pool = torch.cuda.graph_pool_handle()
        self._graphs = DecodeGraphs(*common, pool, self._draw)
        self._prompts = PromptGraphs(*common, pool, self._draw)
        self._ctx: ForwardContext | None = None

    def hidden(self, batch: Batch) -> torch.Tensor:
        if self._graphs.fits(batch):
            self._ctx, hidden_TD = self._graphs.hidden(batch)
            return hidden_TD
        self._ctx = self._context(batch)
        return self._model.forward(self._ctx)

    def draw(self, batch: Batch) -> Ints:
        """The whole step: its samples, all of them `plain`, are drawn into the beginning of `drawn_S`, and into memory
        that the host reads when the step is over."""
        if self._graphs.fits(batch):
            return self._graphs.draw(batch)
        self._graphs.forget()
        tokens = self._prompts.draw(batch)
        if tokens is not None:
            return tokens
        ctx = self._context(batch)
        hidden_TD = self._model.forward(ctx)
        count = len(batch.sample_index)
        if count:
            self._draw(ctx, hidden_TD, count)
            publish(self.drawn_S, self._buffers.control, self._buffers.drawn)
        return self._buffers.tokens(count)

    @property
    def can_go_on(self) -> bool:
        """Whether the step before was drawn by a graph that can run once more."""
        return self._graphs.can_go_on

    def go_on(self, step: NextStep) -> Ints:
        """As `draw`, for the step after the one before."""
        return self._graphs.go_on(step)

    def _draw(self, ctx: ForwardContext, hidden_TD: torch.Tensor, count: int) -> None:
        logits_SV = self._model.lm_head(hidden_TD[self._buffers.sample_index(count)], ctx)
        draw(logits_SV, self._buffers.asked(count), self._num_tokens, self.drawn_S)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        assert self._ctx is not None, "logits are those of a step's hidden states"
        return self._model.logits(hidden_SD, self._ctx)

    def _context(self, batch: Batch) -> ForwardContext:
        self._graphs.forget()
        arrays = [batch.token_ids, batch.positions, batch.slots, batch.query_start, batch.seq_lens, batch.block_tables]
        stretched = bool((batch.ntk_alpha != 1.0).any())
        if stretched:
            arrays.append(np.repeat(batch.ntk_alpha, np.diff(batch.query_start)).view(np.int32))
        places = self._buffers.places([array.size for array in arrays])
        self._buffers.send(batch.sample_index, batch.sampling, arrays, places)
        given_T, positions_T, slots_T, query_start_R1, seq_lens_R, tables = map(self._buffers.at, places[:6])
        rope = self._model.rope
        cos_Tr, sin_Tr = rope.cos_sin(positions_T, self._buffers.at(places[6], torch.float32) if stretched else None)
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
        self._done = itertools.cycle([torch.cuda.Event() for _ in range(TURNS)])  # type: ignore[no-untyped-call]
        # Graphs cannot be recorded on the default stream, and steps keep their order by being on one.
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._forward = CudaForward(model, kv_cache, config)
        self.waiting = ModelRunner(model, kv_cache, self._forward, draw_by_row)

    def submit(self, step: Batch | NextStep) -> SubmittedStep | FinishedStep:
        """Starts a step. A token id below 0 stands for sample ~id of the step before."""
        if isinstance(step, NextStep) and self._forward.can_go_on:
            return self._go_on(step)
        return self._start(step.whole())

    def _go_on(self, step: NextStep) -> SubmittedStep:
        # What `torch.cuda.stream` does, in a third of the time: this runs once in every step.
        before = torch.cuda.current_stream(self._device)
        torch.cuda.set_stream(self._stream)
        try:
            return self._submitted(self._forward.go_on(step))
        finally:
            torch.cuda.set_stream(before)

    @torch.inference_mode()
    def _start(self, batch: Batch) -> SubmittedStep | FinishedStep:
        with torch.cuda.stream(self._stream):
            if batch.prompt_logprobs is None and plain(batch.sampling):
                self._kv_cache.move_blocks(batch, self.waiting.ops)
                return self._submitted(self._forward.draw(batch))
            result = self.waiting.run(batch)
            self._forward.drawn_S[: len(result.token_ids)] = on_device(result.token_ids, self._device)
            return FinishedStep(result)

    def _submitted(self, token_ids: Ints) -> SubmittedStep:
        done = next(self._done)
        done.record(self._stream)
        return SubmittedStep(token_ids, done)

    @torch.inference_mode()
    def read_blocks(self, blocks_L: Ints) -> NDArray[np.uint8]:
        """As `KVCache.read_blocks`, after the steps that were submitted: one of them may be writing these blocks."""
        with torch.cuda.stream(self._stream):
            return self._kv_cache.read_blocks(blocks_L)


def draw_by_row(logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """`sampler.Draw` that looks at each row alone: it is drawn as in the steps that nobody waits for, where that can
    be."""
    cold_S = _too_cold(columns)
    tokens_S = sampler.draw(logits_SV, columns) if cold_S.any() else None
    out_S = torch.empty(len(logits_SV), dtype=torch.int32, device=logits_SV.device)
    states = noise.states(columns.seed, columns.counter).view(np.int64)
    arrays = (states, columns.temperature, columns.top_k, columns.top_p, columns.min_p)
    draw(logits_SV, Asked(*(on_device(array, logits_SV.device) for array in arrays)), logits_SV.shape[1], out_S)
    return out_S.long() if tokens_S is None else torch.where(on_device(cold_S, logits_SV.device), tokens_S, out_S)


def _too_cold(columns: SamplingColumns) -> NDArray[np.bool_]:
    """Whether a sample's temperature is below what the kernels can divide by."""
    return (columns.temperature > 0) & (columns.temperature < MIN_TEMPERATURE)


def plain(columns: SamplingColumns) -> bool:
    """Whether every sample asks for nothing but a temperature and filters, so that it is drawn without waiting."""
    return columns.only_draws and not _too_cold(columns).any()
