"""What the kernels agree on: the GPU, scores in base 2, how fp32 products are taken, a tanh, and fetching ahead."""

from functools import cache

import torch
import triton
import triton.language as tl

_KIB = 1024
# Scores are kept times log2(e), since exp2 is what the hardware has.
LOG2_E = 1.4426950408889634


# For Triton's interpreter; where there is no GPU, `scripts/compile-kernels` has the one here that it compiles for.
NO_GPU = (0, 0)
_capability_of_cpu = NO_GPU
_PROCESSORS_OF_CPU = 132


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, or `NO_GPU`."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _capability_of_cpu


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    if device.type != "cuda":
        return _PROCESSORS_OF_CPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have: less on consumers' GPUs and on old ones."""
    found = capability(device)
    if found == NO_GPU or found[0] in (9, 10):
        return 227 * _KIB
    if found in ((8, 0), (8, 7)):
        return 163 * _KIB
    return (64 if found == (7, 5) else 96) * _KIB


def dot_precision(dtype: torch.dtype) -> str:
    """For `tl.dot`: fp32 operands keep their precision instead of being cut to tf32; 16-bit ones have none to lose."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1), which neither overflows nor gives NaN."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def fetch(addresses):
    """Asks for the lines at `addresses` to be brought into the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
