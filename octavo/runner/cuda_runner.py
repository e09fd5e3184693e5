"""One step on one GPU, submitted without waiting for it: the host is free while the device computes.

Steps run on one stream in the order of their submission. The tokens that a step draws stay on the device, where the
next step may name them (`Batch.token_ids`), and are written to the host's memory on the side. Where all samples ask for
a temperature and filters alone, a step with its draws is one graph. Bias, penalties and log probabilities are torch's
ops between such a graph of the model and the draw; nobody waits for them either.

Shapes: T tokens, R rows, S samples, M blocks of the longest row, V vocabulary.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo import ops
from octavo.batch import SENT, Batch, Ints, LogprobColumns, NextStep, SamplingColumns, StepResult
from octavo.config import EngineConfig
from octavo.layers.context import ForwardContext
from octavo.log import logger
from octavo.models.decoder import Decoder
from octavo.ops.transfer import on_device
from octavo.ops.triton import TritonOps
from octavo.ops.triton.blocks import clear_blocks, pointers_to
from octavo.ops.triton.invariant import segment_for
from octavo.ops.triton.penalties import penalize
from octavo.ops.triton.prepare import look_up, publish
from octavo.ops.triton.sampling import MIN_TEMPERATURE, Asked, draw
from octavo.runner import sampler
from octavo.runner.cuda_graphs import DecodeGraphs, DecodeKind, bucket_of, forward, fused
from octavo.runner.kv_cache import KVCache
from octavo.runner.prompt_graphs import PromptGraphs, most_rows, room_for
from octavo.runner.step_buffers import TURNS, StepBuffers
from octavo.runner.symbolic import between_ops
from octavo.step_layout import StepSize

# Logits that are changed, or whose log probabilities are taken, at once: of 220 samples of a large vocabulary.
_LOGITS_AT_ONCE = 2**25


@dataclass(slots=True)
class SubmittedStep:
    """A step whose tokens will be in `token_ids`, until a later step writes there, and whose log probabilities will be
    in `found`, once `done` has happened."""

    token_ids: Ints
    done: torch.cuda.Event
    sampling: SamplingColumns | None = None  # whose the log probabilities are
    found: list[sampler.Found] = field(default_factory=list)
    prompt_logprobs: LogprobColumns | None = None

    def result(self) -> StepResult:
        self.done.synchronize()
        logprobs = None
        if self.found and self.sampling is not None:
            logprobs = LogprobColumns.spread([each.columns() for each in self.found], self.sampling)
        return StepResult(self.token_ids.copy(), logprobs, self.prompt_logprobs)


class CudaForward:
    """The forward pass and the draws, as a graph where there can be one; `hidden` and `logits` as `PlainForward`'s."""

    def __init__(self, model: Decoder, kv_cache: KVCache, config: EngineConfig):
        self._model = model
        self._kv_cache = kv_cache
        self._ops = TritonOps(model.device, segment_for(config.max_model_len) if config.options.deterministic else 0)
        if self._ops.may_fuse and (why := between_ops(model, kv_cache.layers)):
            logger.warning("kernels are not fused, which is slower, since the model's code is not ops alone: %s", why)
            self._ops.may_fuse = False
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
        if self._graphs.fits(batch) and (found := self._graphs.hidden(batch)) is not None:
            self._ctx, hidden_TD = found
            return hidden_TD
        self._ctx = self._context(batch)
        return forward(self._model, self._ctx)

    def draw(self, batch: Batch) -> Ints:
        """The whole step: its samples, all of them `plain`, are drawn into the beginning of `drawn_S`, and into memory
        that the host reads when the step is over."""
        if self._graphs.fits(batch) and (tokens := self._graphs.draw(batch)) is not None:
            return tokens
        self._graphs.forget()
        tokens = self._prompts.draw(batch)
        if tokens is not None:
            return tokens
        ctx = self._context(batch)
        hidden_TD = forward(self._model, ctx)
        count = len(batch.sample_index)
        if count:
            self._draw(ctx, hidden_TD, count)
            publish(self.drawn_S, self._buffers.control, self._buffers.drawn)
        return self._buffers.tokens(count)

    def draw_changed(self, batch: Batch, hidden_TD: torch.Tensor) -> tuple[Ints, list[sampler.Found]]:
        """As `draw`, of a step whose `hidden` states these are, where logits are changed before or log probabilities
        are wanted: also these, in the host's memory when the step is over."""
        count = len(batch.sample_index)
        index_S, asked = self._buffers.sample_index(count), self._buffers.asked(count)
        drawn_S = torch.empty(count, dtype=torch.int32, device=hidden_TD.device)
        found = []
        step = max(1, _LOGITS_AT_ONCE // self._model.config.vocab_size)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))

            def draw_part(logits_SV: torch.Tensor, columns: SamplingColumns, part: slice = part) -> torch.Tensor:
                draw(logits_SV, Asked(*(each[part] for each in asked)), self._num_tokens, drawn_S[part])
                if (cold := _too_cold(columns)).any():
                    tokens_S = sampler.draw(logits_SV, columns).int()
                    drawn_S[part] = torch.where(on_device(cold, logits_SV.device), tokens_S, drawn_S[part])
                return drawn_S[part].long()

            logits_SV = self.logits(hidden_TD[index_S[part]])
            columns = batch.sampling.part(part.start, part.stop)
            _, some = sampler.sample(logits_SV, columns, draw_part, partial(penalize, before_S=self.drawn_S))
            if some is not None:
                found.append(some.to_host())
        self.drawn_S[:count] = drawn_S
        publish(self.drawn_S, self._buffers.control, self._buffers.drawn)
        return self._buffers.tokens(count), found

    def be_patient(self, times: int) -> None:
        """So many steps of a kind that has no graph run without one before one is recorded."""
        self._graphs.missed.patience = self._prompts.missed.patience = times

    def take_missed(self) -> DecodeKind | StepSize | None:
        """A kind of steps that ran without a graph, to be recorded now."""
        return self._graphs.missed.take() or self._prompts.missed.take()

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
        arrays: dict[str, NDArray[Any]] = {each.name: getattr(batch, each.name) for each in SENT}
        if stretched := bool((batch.ntk_alpha != 1.0).any()):
            arrays["ntk_alpha"] = np.repeat(batch.ntk_alpha, np.diff(batch.query_start))
        places = self._buffers.places({name: array.size for name, array in arrays.items()})
        self._buffers.send(batch.sample_index, batch.sampling, arrays, places)
        tensors = self._buffers.tensors(places)
        alpha_T = tensors.pop("ntk_alpha").view(torch.float32) if stretched else None
        tensors["token_ids"] = look_up(tensors["token_ids"], self.drawn_S)
        tensors["block_tables"] = tensors["block_tables"].view(batch.block_tables.shape)
        return ForwardContext.of(
            tensors,
            self._model.rope.angles(tensors["positions"], alpha_T),
            (batch.query_start, batch.seq_lens),
            fused(self._ops, singles=False),
            self._kv_cache.layers,
        )


class CudaRunner:
    """Runs `model` over `kv_cache` with the step sizes of `config`."""

    def __init__(self, model: Decoder, kv_cache: KVCache, config: EngineConfig):
        self.model = model
        self.kv_cache = kv_cache
        self.layout = f"torch on {model.device.type}"
        self._device = model.device
        self._ops = ops.for_device(model.device)
        caches = [cache for layer in kv_cache.layers for cache in (layer.k_PBKH, layer.v_PBKH)]
        self._caches = pointers_to(caches)
        self._block_size = caches[0].shape[1]
        self._bytes_in_cache = caches[0][0].nbytes  # of a block
        self._done = itertools.cycle([torch.cuda.Event() for _ in range(TURNS)])  # type: ignore[no-untyped-call]
        # Graphs cannot be recorded on the default stream, and steps keep their order by being on one.
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self.forward = CudaForward(model, kv_cache, config)

    def submit(self, step: Batch | NextStep, whole: Callable[[], Batch]) -> SubmittedStep:
        """Starts a step. A token id below 0 stands for sample ~id of the step before."""
        if isinstance(step, Batch):
            return self.start(step)
        return self._go_on(step) if self.forward.can_go_on else self.start(whole())

    def _go_on(self, step: NextStep) -> SubmittedStep:
        # What `torch.cuda.stream` does, without its checks: this runs in every step.
        before = torch.cuda.current_stream(self._device)
        torch.cuda.set_stream(self._stream)
        try:
            return self._submitted(self.forward.go_on(step))
        finally:
            torch.cuda.set_stream(before)

    @torch.inference_mode()
    def start(self, batch: Batch) -> SubmittedStep:
        """Starts a step that does not go on from the one before."""
        forward = self.forward
        batch.check_ids(self.model.config.vocab_size, len(forward.drawn_S))
        with torch.cuda.stream(self._stream):
            self.kv_cache.move_blocks(batch, self._ops)
            # Single tokens' kernels load no key behind a row's last; those of prompts load whole blocks.
            if len(blocks := batch.begun_blocks(self._block_size, of_chunks=True)):
                clear_blocks(self._caches, on_device(blocks, self._device), self._bytes_in_cache)
            if batch.prompt_logprobs is None and plain(batch.sampling):
                return self._submitted(forward.draw(batch))
            hidden_TD = forward.hidden(batch)
            prompt_logprobs = None
            if batch.prompt_logprobs is not None and len(batch.prompt_logprobs.target):
                # The one thing that is waited for: there may be far more of them than memory to keep them in.
                prompt_logprobs = sampler.prompt_logprobs(
                    lambda index: forward.logits(hidden_TD[on_device(index, self._device)]), batch.prompt_logprobs
                )
            step = self._submitted(*forward.draw_changed(batch, hidden_TD))
            step.sampling, step.prompt_logprobs = batch.sampling, prompt_logprobs
            return step

    def _submitted(self, token_ids: Ints, found: list[sampler.Found] | None = None) -> SubmittedStep:
        done = next(self._done)
        done.record(self._stream)
        return SubmittedStep(token_ids, done, found=found or [])

    @torch.inference_mode()
    def read_blocks(self, blocks_L: Ints) -> NDArray[np.uint8]:
        """As `KVCache.read_blocks`, after the steps that were submitted: one of them may be writing these blocks."""
        with torch.cuda.stream(self._stream):
            return self.kv_cache.read_blocks(blocks_L)


def _too_cold(columns: SamplingColumns) -> NDArray[np.bool_]:
    """Whether a sample's temperature is below what the kernels can divide by."""
    return (columns.temperature > 0) & (columns.temperature < MIN_TEMPERATURE)


def plain(columns: SamplingColumns) -> bool:
    """Whether every sample asks for nothing but a temperature and filters, so that it is drawn without waiting."""
    return columns.only_draws and not _too_cold(columns).any()
