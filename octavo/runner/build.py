"""From options to an executor: opens the model, settles every choice, plans the memory, loads.

The order is that of the cost of finding out: what is wrong with an option or with the memory shows before weights are
read.
"""

import time

from octavo import __version__
from octavo.checkpoint import Checkpoint, open_engine_checkpoint
from octavo.checkpoint.fingerprint import fingerprint
from octavo.config import EngineConfig, EngineOptions
from octavo.kernels.support import settle
from octavo.log import logger
from octavo.memory import MemoryPlan, free_ram, resolve
from octavo.models import read_model
from octavo.models.sizes import stored_types, weight_bytes
from octavo.runner.device import choose_device
from octavo.runner.executor import Executor, load_executor
from octavo.timeline import Timeline


def build_executor(
    options: EngineOptions, checkpoint: Checkpoint | None = None
) -> tuple[Executor, EngineConfig, MemoryPlan, Timeline, bytes]:
    """The executor for `options`, what was settled, where the memory goes, and the (phase, seconds) it took.

    The last are bytes that name all that the K and V of a token depend on, if a prefix store needs them.
    Raises `CheckpointError`, `ConfigError`, `CapacityError` or `DownloadError`.
    """
    timeline: Timeline = []
    began = time.monotonic()

    def mark(phase: str) -> None:
        nonlocal began
        timeline.append((phase, time.monotonic() - began))
        began = time.monotonic()

    device = choose_device(options.device)
    if checkpoint is None:
        checkpoint = open_engine_checkpoint(options)
    model = read_model(checkpoint)
    mark("open model")
    has_bfloat16, (free, total) = _of_device(device)
    dtype, precision, why = settle(options, model, stored_types(checkpoint.tensors), device, has_bfloat16)
    if why:
        logger.warning("the CPU's own kernels cannot run this model, so plain torch does, much slower: %s", why)
    weights = weight_bytes(checkpoint.tensors, model, dtype, precision)
    config, plan = resolve(
        options,
        model,
        weights,
        device=device,
        dtype=dtype,
        free=free,
        total=total,
        host_free=free_ram(),
        precision=precision,
    )
    executor = load_executor(checkpoint, config, options.load_format)
    mark("load weights")
    identity = b""
    if options.prefix_cache_dir:
        identity = kv_identity(checkpoint, config, executor.layout)
        mark("hash weights")
    return executor, config, plan, timeline, identity


def kv_identity(checkpoint: Checkpoint, config: EngineConfig, layout: str) -> bytes:
    """Bytes that are equal where equal tokens have the same bytes in a block: across restarts, copies and renaming."""
    how = (__version__, layout, config.model, config.dtype, config.kv_dtype, config.weights, config.block_size)
    return fingerprint(checkpoint) + repr(how).encode()


def _of_device(device: str) -> tuple[bool, tuple[int, int | None]]:
    """Whether it computes in bfloat16, and its memory: (free, in all), the latter None for RAM."""
    if device == "cpu":
        return True, (free_ram(), None)
    import torch

    return torch.cuda.is_bf16_supported(), torch.cuda.mem_get_info()
