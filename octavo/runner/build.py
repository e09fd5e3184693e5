"""From options to an executor: opens the model, settles every choice, plans the memory, loads.

The order is that of the cost of finding out: what is wrong with an option or with the memory shows before weights are
read.
"""

import time

import torch

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineConfig, EngineOptions
from octavo.errors import ConfigError
from octavo.kernels.support import settle
from octavo.log import logger
from octavo.memory import MemoryPlan, free_ram, resolve
from octavo.models import read_model
from octavo.models.sizes import stored_types, weight_bytes
from octavo.runner.executor import Executor, load_executor

Timeline = list[tuple[str, float]]


def build_executor(options: EngineOptions) -> tuple[Executor, EngineConfig, MemoryPlan, Timeline]:
    """The executor for `options`, what was settled, where the memory goes, and the (phase, seconds) it took.

    Raises `CheckpointError`, `ConfigError`, `CapacityError` or `DownloadError`.
    """
    timeline: Timeline = []
    began = time.monotonic()

    def mark(phase: str) -> None:
        nonlocal began
        timeline.append((phase, time.monotonic() - began))
        began = time.monotonic()

    device = choose_device(options.device)
    checkpoint = open_checkpoint(
        options.model, hub=options.hub, revision=options.revision, weights=options.load_format != "dummy"
    )
    model = read_model(checkpoint)
    mark("open model")
    has_bfloat16 = device == "cpu" or torch.cuda.is_bf16_supported()
    dtype, precision, why = settle(options, model, stored_types(checkpoint.tensors), device, has_bfloat16)
    if why:
        logger.warning("the CPU's own kernels cannot run this model, so plain torch does, much slower: %s", why)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_ram()
    weights = weight_bytes(checkpoint.tensors, model, dtype, precision)
    config, plan = resolve(
        options,
        model,
        weights,
        device=device,
        dtype=dtype,
        free=free,
        host_free=free_ram(),
        precision=precision,
    )
    executor = load_executor(checkpoint, config, options.load_format)
    mark("load weights")
    return executor, config, plan, timeline


def choose_device(wanted: str) -> str:
    """`wanted`, or the best device there is for `auto`; `ConfigError` for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} {built}; use --device cpu or install a CUDA torch"
        )
    return wanted
