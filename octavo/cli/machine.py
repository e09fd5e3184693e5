"""What this machine has, found without torch: GPUs by the driver's own tool, torch's build by its version."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in bytes."""

    index: int
    name: str
    total: int
    free: int
    driver: str


def gpus() -> list[Gpu]:
    """The GPUs that a process here would see (CUDA_VISIBLE_DEVICES is obeyed); empty without a working driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=index,name,memory.total,memory.free,driver_version"
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in said.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and fields[0].isdigit() and fields[2].isdigit() and fields[3].isdigit():
            total, free = int(fields[2]) << 20, int(fields[3]) << 20
            found.append(Gpu(int(fields[0]), fields[1], total, free, fields[4]))
    return _visible(found)


def _visible(found: list[Gpu]) -> list[Gpu]:
    """Only plain numbers are understood; names of devices (UUIDs) leave all of them in."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return found
    words = [word.strip() for word in named.split(",") if word.strip()]
    if all(word.lstrip("-").isdigit() for word in words):
        by_index = {gpu.index: gpu for gpu in found}
        return [by_index[int(word)] for word in words if int(word) in by_index]
    return found


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
