"""Which of the kernels in Gluon are used on a GPU, and why.

Gluon changes with each version of Triton. Under a version that Octavo was measured with they are used as they are.
Under any other a process of its own (`hopper_check`) compiles them and holds them against the reference, once: what
came of it is kept on disk by GPU, versions and the kernels' own text. What is not right, or does not compile, is not
used, and the kernels that every GPU has stand in.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from octavo.config import cache_home
from octavo.errors import ConfigError
from octavo.log import logger
from octavo.ops.triton.tiles import capability

# Versions of Triton whose kernels were tested and timed on a GPU.
MEASURED = ("3.6",)
_SECONDS = 300  # for a check; it takes about 30
_TEXTS = ("gluon.py", "hopper.py", "streamed.py", "tiles.py", "hopper_check.py")
NAMES = {"attention": "attention of prompts", "streamed": "products whose weights stream"}


@dataclass(frozen=True, slots=True)
class HopperKernels:
    """For each kernel why it is not used, or "" if it is; `how` says what this rests on."""

    attention: str
    streamed: str
    how: str

    @classmethod
    def none(cls, why: str) -> "HopperKernels":
        return cls(why, why, "")


@cache
def usable(device: torch.device) -> HopperKernels:
    """For `device`; the first call for a GPU may take as long as a check."""
    if capability(device)[0] != 9:
        return HopperKernels.none("this is no Hopper GPU (sm_90)")
    try:
        from octavo.ops.triton import hopper, streamed  # noqa: F401
    except (ImportError, AttributeError) as error:
        return HopperKernels.none(f"Triton {triton.__version__} lacks what they need: {error}")
    if triton.__version__.rpartition(".")[0] in MEASURED:
        return HopperKernels("", "", f"measured with Triton {MEASURED[-1]}")
    return _checked(device)


def described(device: torch.device) -> str:
    """One line of which kernels run on `device`."""
    major, minor = capability(device)
    line = f"Triton {triton.__version__}, torch {torch.__version__}, sm_{major}{minor}"
    if major != 9:
        return line
    kernels = usable(device)
    used = [name for kind, name in NAMES.items() if not getattr(kernels, kind)]
    if used:
        line += f"; for Hopper {' and '.join(used)} ({kernels.how})"
    for kind, name in NAMES.items():
        if why := getattr(kernels, kind):
            line += f"; without Hopper's {name}, which makes it slower: {why}"
    return line


def _checked(device: torch.device) -> HopperKernels:
    """By the check of an earlier start, or by one that is made now."""
    how = f"checked on this GPU under Triton {triton.__version__}"
    place = _place(device)
    if place is not None and (said := _read(place)) is not None:
        return HopperKernels(said["attention"], said["streamed"], how)
    logger.info("kernels for Hopper were not measured with Triton %s; checks them once", triton.__version__)
    said, why = _ask(device)
    if said is None:
        return HopperKernels.none(f"they could not be checked: {why}")
    if place is not None:
        _keep(place, said)
    return HopperKernels(said["attention"], said["streamed"], how)


def _place(device: torch.device) -> Path | None:
    """Where the result of a check lies; None for a user without a home."""
    name, here = torch.cuda.get_device_name(device), Path(__file__).parent
    key = hashlib.sha256(repr((name, torch.version.cuda, torch.__version__, triton.__version__)).encode())
    for text in _TEXTS:
        key.update((here / text).read_bytes())
    try:
        return cache_home() / "kernels" / f"hopper-{key.hexdigest()[:16]}.json"
    except ConfigError:
        return None


def _read(place: Path) -> dict[str, str] | None:
    """None if nothing whole is there."""
    try:
        return _valid(json.loads(place.read_text("utf-8")))
    except (OSError, ValueError):
        return None


def _valid(said: object) -> dict[str, str]:
    if not isinstance(said, dict) or said.keys() != NAMES.keys() or not all(isinstance(v, str) for v in said.values()):
        raise ValueError("no result of a check")
    return said


def _keep(place: Path, said: dict[str, str]) -> None:
    with suppress(OSError):  # a folder that cannot be written costs the next start a check
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(said, file)
        Path(file.name).replace(place)


def _ask(device: torch.device) -> tuple[dict[str, str] | None, str]:
    """What `hopper_check` says, or (None, why it says nothing)."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "octavo.ops.triton.hopper_check", str(device)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_SECONDS,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        return _valid(json.loads(done.stdout.strip().splitlines()[-1])), ""
    except subprocess.TimeoutExpired:
        return None, f"no result within {_SECONDS} s"
    except (OSError, ValueError, IndexError):
        words = done.stderr.strip().splitlines() if "done" in locals() else []
        return None, words[-1][:300] if words else "the process that checks them ended without a word"
