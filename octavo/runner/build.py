"""From options to an executor: opens the model, settles every choice, plans the memory, loads.

The order is that of the cost of finding out: what is wrong with an option or with the memory shows before weights are
read.
"""

import time
from typing import TYPE_CHECKING

from octavo.checkpoint import Checkpoint, open_engine_checkpoint
from octavo.checkpoint.fingerprint import fingerprint
from octavo.config import EngineConfig, EngineOptions
from octavo.kernels.support import kv_dtype, settle
from octavo.log import logger
from octavo.memory import DeviceMemory, KeptAs, MemoryPlan, free_ram, resolve
from octavo.models import check_runnable, read_model
from octavo.models.sizes import stored_types, weight_bytes
from octavo.runner.device import choose_device
from octavo.runner.executor import Executor, load_executor
from octavo.timeline import Timeline
from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.runner.cuda_memory import Measured


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
        checkpoint = open_engine_checkpoint(options, check_runnable)
    model = read_model(checkpoint)
    mark("open model")
    capability, (free, total) = _of_device(device)
    dtype, precision, why = settle(options, model, stored_types(checkpoint.tensors), device, capability)
    if device == "cuda":
        logger.info("kernels: %s", _described(device))
    if why:
        logger.warning("the CPU's own kernels cannot run this model, so plain torch does, much slower: %s", why)
    memory = DeviceMemory(device, free, total, free_ram())
    kept_as = KeptAs(dtype, precision, kv_dtype(options, dtype, device))
    weights = weight_bytes(checkpoint.tensors, model, dtype, precision)
    config, plan = resolve(options, model, weights, memory, kept_as)

    phase = "load weights"

    def settle_memory(found: "Measured") -> EngineConfig:
        nonlocal config, plan, phase, began
        began += found.seconds
        mark(phase)
        timeline.append(("measure memory", found.seconds))
        phase = "make cache"
        config, plan = resolve(options, model, found.weights, memory, kept_as, found.working)
        return config

    executor = load_executor(checkpoint, config, options.load_format, settle_memory)
    mark(phase)
    if config.device == "cuda" and config.warm_up != "none":
        executor.warm_up()
        mark("warm-up")
    identity = b""
    if options.prefix_cache_dir:
        identity = kv_identity(checkpoint, config, executor.layout)
        mark("hash weights")
    return executor, config, plan, timeline, identity


def _described(device: str) -> str:
    import torch

    from octavo.ops import described

    return described(torch.device(device))


def kv_identity(checkpoint: Checkpoint, config: EngineConfig, layout: str) -> bytes:
    """Bytes that are equal where equal tokens have the same bytes in a block: across restarts, copies and renaming."""
    how = (__version__, layout, config.model, config.dtype, config.kv_dtype, config.weights, config.block_size)
    return fingerprint(checkpoint) + repr(how).encode()


def _of_device(device: str) -> tuple[tuple[int, int], tuple[int, int | None]]:
    """A GPU's compute capability, and the device's memory: (free, in all), the latter None for RAM."""
    if device == "cpu":
        return (0, 0), (free_ram(), None)
    import torch

    torch.cuda.empty_cache()  # what an engine before this one has left is no one else's
    return torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
