"""The compiled kernels, opened: the C structures and functions of `csrc/`, for the best instruction set that this
processor has and this installation was built for.

Nothing here knows torch; addresses are integers. The structures mirror `packed.h` and `program.h`.
"""

import ctypes
import functools
import platform
import re
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from octavo.batch import SENT
from octavo.kernels.builds import BUILDS, builds_of

# Types of stored weights by the checkpoint's words, in the order of `enum Stored`.
STORED = {
    word: number
    for number, word in enumerate(
        ("F32", "BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    )
}
# Formats of packed weights, in the order of `enum Format`; quantized files keep their own precision in `int4`'s.
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
EMBED, NORM, ADD_NORM, LINEAR, SILU_MUL, ROPE, ATTEND = range(7)


class Weight(Structure):
    _fields_ = (
        ("format", c_int32),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
        ("offset", c_int32),
        ("minima", ctypes.c_bool),
        ("wide", ctypes.c_bool),
        ("exact", ctypes.c_bool),
        ("halves", c_int32),
        ("panel_bytes", c_int64),
        ("scales_at", c_int64),
        ("minima_at", c_int64),
        ("data", c_void_p),
        ("scale", c_void_p),
    )


class Operand(Structure):
    _fields_ = (("buffer", c_int32), ("offset", c_int32))


class CacheShape(Structure):
    _fields_ = (("block_size", c_int64), ("kv_heads", c_int64), ("width", c_int64), ("bytes", c_int32))


class Instruction(Structure):
    _fields_ = (
        ("code", c_int32),
        ("heads", c_int32),
        ("inputs", Operand * 3),
        ("outputs", Operand * 2),
        ("width", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("stored", c_int64),
        ("number", c_float),
        ("soft_cap", c_float),
        ("window", c_int64),
        ("half", c_int64),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("cache", CacheShape),
        ("from_room", c_int32),
        ("to_room", c_int32),
        ("next", c_void_p),
        ("gated", c_int32),
    )


class Buffer(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64))


class Program(Structure):
    _fields_ = (
        ("instructions", POINTER(Instruction)),
        ("size", c_int64),
        ("buffers", POINTER(Buffer)),
        ("most_inputs", c_int64),
    )


class Step(Structure):
    """A step's arrays, by their names in `Batch`; `csrc/step.h` is made of this."""

    _fields_ = (
        ("tokens", c_int32),
        ("rows", c_int32),
        ("table_stride", c_int64),
        *((each.name, c_void_p) for each in SENT),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_scale", c_void_p),
    )


# How to draw a sample, an entry a row of logits; a numpy structure.
DRAW = [("temperature", "<f4"), ("top_k", "<i4"), ("top_p", "<f4"), ("min_p", "<f4"), ("key", "<u4", 2)]

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "octavo_allocate": (c_void_p, (c_int64,)),
    "octavo_free": (None, (c_void_p, c_int64)),
    "octavo_usable": (ctypes.c_bool, ()),
    "octavo_engine": (c_void_p, (c_int32,)),
    "octavo_close": (None, (c_void_p,)),
    "octavo_lay_out": (c_int64, (POINTER(Weight),)),
    "octavo_lay_out_exact": (c_int64, (POINTER(Weight), c_int32)),
    "octavo_can_gate": (ctypes.c_bool, (c_void_p,)),
    "octavo_can_gate_into": (ctypes.c_bool, (c_void_p,)),
    "octavo_pack": (None, (c_void_p, POINTER(Weight), c_int64, c_int64, c_int32, c_void_p, c_int64)),
    "octavo_read_rows": (None, (c_int32, c_void_p, c_int64, c_int64, c_void_p)),
    "octavo_run": (None, (c_void_p, POINTER(Program), POINTER(Step))),
    "octavo_profile": (None, (c_void_p, c_void_p)),
    "octavo_sample": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
}


class Kernels:
    """The functions of one build, by their C names without the prefix."""

    def __init__(self, path: Path, name: str):
        self.name = name
        self._library = ctypes.CDLL(str(path))
        for function, (result, arguments) in _FUNCTIONS.items():
            found = getattr(self._library, function)
            found.restype, found.argtypes = result, arguments

    def __getattr__(self, function: str) -> Any:
        return getattr(self._library, f"octavo_{function}")


class KernelThreads:
    """`count` threads that run `kernels` together, and their room for what is in between; they end with this object."""

    def __init__(self, kernels: Kernels, count: int):
        self.kernels = kernels
        self.address: int = kernels.engine(count)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.kernels.close(self.address)


def builds() -> dict[str, Path]:
    """The builds that lie beside this file and that this processor can run, the best first; on this maker's processors
    one of them may be right and yet slower than the next."""
    has, _ = processor()
    here = {path.name.split(".")[0]: path for path in Path(__file__).parent.glob("_kernels_*.so")}
    return {
        name: here[f"_kernels_{name}"]
        for name, build in builds_of(platform.machine()).items()
        if f"_kernels_{name}" in here and has.issuperset(build.needs)
    }


@functools.cache
def load(name: str | None = None) -> Kernels | None:
    """The build called `name`, or the best for this maker's processors that the system lets run (it may refuse tiles);
    None if there is none."""
    _, maker = processor()
    found = builds()
    wanted = [build for build in found if BUILDS[build].maker in (None, maker)] if name is None else [name]
    opened = (Kernels(found[build], build) for build in wanted if build in found)
    return next((kernels for kernels in opened if kernels.usable()), None)


def processor() -> tuple[set[str], str | None]:
    """What this processor can do, in the words of /proc/cpuinfo, and its maker's name there."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {"asimddp"}, None  # every Apple processor has it
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    maker = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return set(found[1].split() if found else ()), maker[1] if maker else None
