"""A model on the CPU's own kernels: packed weights, the kernels' cache, the step graph over both, and the draw."""

import numpy as np
import torch

from octavo.batch import Batch, SamplingColumns, StepResult
from octavo.checkpoint import Checkpoint
from octavo.config import EngineConfig
from octavo.kernels import library
from octavo.kernels.library import KernelThreads
from octavo.kernels.weights import Packer
from octavo.log import logger
from octavo.models.loader import load_model
from octavo.ops.cpu.calls import KernelOps
from octavo.ops.cpu.tape import NotRecordableError
from octavo.runner import noise
from octavo.runner.forward import Forward, PlainForward
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from octavo.runner.step_graph import StepGraph

_CPU = torch.device("cpu")


def kernel_runner(checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto") -> ModelRunner:
    """Loads and records the model; raises as `load_model` does. There are as many threads as torch would use."""
    kernels = library.load()
    assert kernels is not None, "the configuration was settled for kernels that are there"
    threads = KernelThreads(kernels, torch.get_num_threads())
    # Norms and biases are fp32; matrices are packed, and the arena takes room only as they fill it.
    packer = Packer(threads, config.weights, 5 * config.model.num_parameters() + 2**24)
    stored = torch.bfloat16 if load_format == "dummy" and config.weights != "float32" else torch.float32
    model = load_model(checkpoint, config.model, stored, _CPU, load_format, packer=packer)
    kv_dtype = getattr(torch, config.kv_dtype)
    cache = KVCache(
        config.model, config.num_blocks, config.block_size, kv_dtype, _CPU, num_host_blocks=config.num_host_blocks
    )
    forward: Forward
    try:
        forward = StepGraph(model, cache, threads, config.max_num_batched_tokens, config.max_model_len)
    except NotRecordableError as why:
        logger.warning("the model's step cannot be recorded, so its kernels are called one by one, slower: %s", why)
        forward = PlainForward(model, cache, KernelOps(threads))
    return KernelRunner(model, cache, forward, KernelDraw(threads), f"kernels {kernels.name}")


class KernelRunner(ModelRunner):
    """Keeps torch to one thread while a step runs: its others spin for a moment after each op that was divided among
    them, on the cores that the kernels' threads need (decision 0097)."""

    def run(self, batch: Batch) -> StepResult:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().run(batch)
        finally:
            torch.set_num_threads(threads)


class KernelDraw:
    """`sampler.Draw` in C++."""

    def __init__(self, threads: KernelThreads):
        self._threads = threads

    def __call__(self, logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        S, V = logits_SV.shape
        draws = np.zeros(S, library.DRAW)
        draws["temperature"] = columns.temperature
        draws["top_k"] = columns.top_k
        draws["top_p"] = columns.top_p
        draws["min_p"] = columns.min_p
        draws["key"] = noise.keys(columns.seed, columns.counter).view(np.uint32)
        tokens = np.empty(S, np.int32)
        logits = logits_SV.data_ptr(), S, V, logits_SV.stride(0)
        self._threads.kernels.sample(self._threads.address, *logits, draws.ctypes.data, tokens.ctypes.data)
        return torch.from_numpy(tokens).long()
