"""Which device an engine runs on. Torch, which takes long to load, is only asked where a GPU could be."""

import platform
from pathlib import Path

from octavo.errors import ConfigError

# What a driver for GPUs that torch knows puts there: NVIDIA's own, Windows' for Linux guests, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def choose_device(wanted: str) -> str:
    """`wanted`, or the best device there is for `auto`; `ConfigError` for a device that is not there."""
    if wanted == "cpu" or (wanted == "auto" and not may_have_gpu()):
        return "cpu"
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} {built}; use --device cpu or install a CUDA torch"
        )
    return wanted


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
