"""Which device an engine runs on. Torch, which takes long to load, is only asked where a GPU could be."""

import contextlib
import os
import platform
import re
from pathlib import Path

from octavo.errors import ConfigError
from octavo.log import logger

# What a driver for GPUs that torch knows puts there: NVIDIA's own, Windows' for Linux guests, AMD's.
_GPUS = "/proc/driver/nvidia/gpus"
_WITHOUT_CUDA = "no torch for CUDA is installed"
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def choose_device(wanted: str) -> str:
    """`wanted`, or the best device there is for `auto`; `ConfigError` for a device that is not there."""
    if wanted == "auto" and not may_have_gpu():
        _tell_of_idle_gpu(_WITHOUT_CUDA)
        return "cpu"
    if wanted == "cpu":
        return "cpu"
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        _tell_of_idle_gpu(f"torch {torch.__version__} finds no usable one")
        return "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} {built}; use --device cpu or install a CUDA torch"
        )
    return wanted


def _tell_of_idle_gpu(why: str) -> None:
    """Says in one line that a CPU stands in for a GPU that is there."""
    if names := idle_gpus():
        found = names[0] if len(names) == 1 else f"{len(names)} GPUs ({names[0]}, ...)"
        logger.warning(
            "the model runs on the CPU although this machine has %s: %s; see `octavo doctor`, or choose --device cpu",
            *(found, why),
        )


def idle_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a process here would see, by what the driver tells, without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return []
    found = []
    for path in sorted(Path(_GPUS).glob("*/information")):
        with contextlib.suppress(OSError):
            told = re.search(r"^Model:\s*(.+)$", path.read_text("utf-8", "replace"), re.MULTILINE)
            found.append(told[1].strip() if told else "an NVIDIA GPU")
    return found


def may_have_gpu() -> bool:
    """Whether torch might find a GPU: its build is not one for CPUs alone, and there is a driver."""
    driver = platform.system() != "Linux" or any(Path(driver).exists() for driver in _DRIVERS)
    return driver and torch_may_use_gpu()


def torch_may_use_gpu() -> bool:
    """Whether the installed torch is not marked as a build for CPUs alone; whether it works, only torch can tell."""
    from importlib import metadata

    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
