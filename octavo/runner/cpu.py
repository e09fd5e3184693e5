"""A model on the CPU's own kernels: packed weights, the kernels' cache, the step graph over both, and the draw.

All of it is numpy's arrays: torch, whose import takes longer than everything else at a start, is loaded by a model that
cannot be recorded, and else by nobody (docs/decisions/0105).

Shapes: T tokens, S samples, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Batch, Floats, Ints, LogprobColumns, SamplingColumns, StepResult
from octavo.checkpoint import Checkpoint
from octavo.config import EngineConfig
from octavo.kernels import library
from octavo.kernels.library import KernelThreads
from octavo.kernels.weights import Packer
from octavo.log import logger
from octavo.models.decoder import Decoder
from octavo.models.packed import load_packed
from octavo.ops.symbol import NotRecordableError
from octavo.runner import host_sampler, noise
from octavo.runner.kernel_cache import KernelCache
from octavo.runner.step_graph import StepGraph

if TYPE_CHECKING:
    import torch

_DRAW = np.dtype(library.DRAW)


def kernel_runner(checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto") -> KernelRunner:
    """Loads and records the model; raises as `load_packed` does."""
    kernels = library.load()
    assert kernels is not None, "the configuration was settled for kernels that are there"
    threads = KernelThreads(kernels, num_threads())
    # Norms and biases are fp32; matrices are packed, and the arena takes room only as they fill it.
    packer = Packer(threads, config.weights, 5 * config.model.num_parameters() + 2**24)
    model = load_packed(checkpoint, config.model, config.weights, packer, kernels, load_format)
    cache = KernelCache(
        config.model, config.num_blocks, config.block_size, config.kv_dtype, num_host_blocks=config.num_host_blocks
    )
    forward: KernelForward
    try:
        forward = StepGraph(model, cache, threads, config.max_num_batched_tokens, config.max_model_len)
    except NotRecordableError as why:
        logger.warning("the model's step cannot be recorded, so its kernels are called one by one, slower: %s", why)
        forward = CalledKernels(model, cache, threads)
    return KernelRunner(model, cache, forward, KernelDraw(threads), f"kernels {kernels.name} on cpu")


def num_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the cores that this process may use; two threads of a core count once."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    places = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings") for cpu in os.sched_getaffinity(0)]
    return len({place.read_text() if place.exists() else str(place) for place in places})


class KernelForward(Protocol):
    """A model's part of a step. What comes back may lie in memory that the next call of the same method writes to."""

    def hidden(self, batch: Batch) -> Floats:
        """Computes the batch's tokens, writing their K and V into the cache: hidden states, [T, D]."""

    def logits(self, hidden_SD: Floats) -> Floats:
        """Logits of any rows of the last `hidden`, [S, V]; may be written into."""


class CalledKernels:
    """The model's own code with kernels that are called one by one, on torch's tensors."""

    def __init__(self, model: Decoder, kv_cache: KernelCache, threads: KernelThreads):
        import torch

        from octavo.layers.rope import Rope
        from octavo.ops.cpu.eager import KernelOps
        from octavo.runner.forward import PlainForward

        model.device = torch.device("cpu")
        model.rope = Rope(model.config.rope, model.device)
        self._plain = PlainForward(model, kv_cache, KernelOps(threads))

    def hidden(self, batch: Batch) -> Floats:
        with _torch_on_one_thread():
            return _array(self._plain.hidden(batch))

    def logits(self, hidden_SD: Floats) -> Floats:
        with _torch_on_one_thread():
            return _array(self._plain.logits(_tensor(hidden_SD)))


class KernelRunner:
    """Runs `model` over `kv_cache` by `forward`: what `ModelRunner` is for a device of torch's.

    `layout` names who computes K and V and how they lie in a block (see `Executor.layout`).
    """

    def __init__(self, model: Decoder, kv_cache: KernelCache, forward: KernelForward, draw: KernelDraw, layout: str):
        self.model = model
        self.kv_cache = kv_cache
        self.forward = forward
        self.draw = draw
        self.layout = layout

    def run(self, batch: Batch) -> StepResult:
        """Copies blocks, computes the step's tokens, draws the samples."""
        batch.check_ids(self.model.config.vocab_size)
        self.kv_cache.move_blocks(batch)
        self.kv_cache.clear_begun(batch)
        hidden_TD = self.forward.hidden(batch)
        result = StepResult(token_ids=np.empty(0, np.int32))
        if batch.prompt_logprobs is not None and len(batch.prompt_logprobs.target):
            result.prompt_logprobs = host_sampler.prompt_logprobs(
                lambda index: self.forward.logits(hidden_TD[index]), batch.prompt_logprobs
            )
        if len(batch.sample_index):
            self._sample(self._sample_logits(hidden_TD, batch.sample_index), batch.sampling, result)
        return result

    def _sample_logits(self, hidden_TD: Floats, sample_index: Ints) -> Floats:
        """A row of logits for each sample; the n samples of a prompt share one until they are changed."""
        if (sample_index[1:] > sample_index[:-1]).all():
            return self.forward.logits(hidden_TD[sample_index])
        index, inverse = np.unique(sample_index, return_inverse=True)
        return self.forward.logits(hidden_TD[index])[inverse]

    def _sample(self, logits_SV: Floats, columns: SamplingColumns, result: StepResult) -> None:
        asks = np.flatnonzero(columns.num_logprobs >= 0)
        raw_EV = logits_SV[asks]
        host_sampler.change_logits(logits_SV, columns)
        result.token_ids = self.draw(logits_SV, columns)
        if len(asks):
            found = host_sampler.logprobs(raw_EV, result.token_ids[asks], int(columns.num_logprobs.max()))
            result.logprobs = LogprobColumns.spread([found], columns)


class KernelDraw:
    """Temperature, filters and the draw in C++, as `sampler.Draw` has it; the logits are used up."""

    def __init__(self, threads: KernelThreads):
        self._threads = threads

    def __call__(self, logits_SV: Floats, columns: SamplingColumns) -> Ints:
        S, V = logits_SV.shape
        draws = np.zeros(S, _DRAW)  # a temperature of 0 asks for nothing else
        if columns.temperature.any():
            draws["temperature"] = columns.temperature
            draws["top_k"] = columns.top_k
            draws["top_p"] = columns.top_p
            draws["min_p"] = columns.min_p
            draws["key"] = noise.keys(columns.seed, columns.counter).view(np.uint32)
        tokens = np.empty(S, np.int32)
        logits = logits_SV.ctypes.data, S, V, logits_SV.strides[0] // logits_SV.itemsize
        self._threads.kernels.sample(self._threads.address, *logits, draws.ctypes.data, tokens.ctypes.data)
        return tokens


@contextlib.contextmanager
def _torch_on_one_thread() -> Iterator[None]:
    """Its others would spin for a moment after each op, on the cores that the kernels' threads need (decision 0097)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensor(array: Any) -> torch.Tensor:
    """The same memory as a tensor; the first call loads torch."""
    import torch

    return torch.from_numpy(array)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array
