"""Gluon as the kernels here use it, under one name for each thing: Triton 3.6 to 3.9 differ in some.

Raises `ImportError` where a name is missing, in older versions of Triton and perhaps in newer ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "async_load",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

# A bulk copy into shared memory: (descriptor, coordinates, barrier, memory).
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(memory, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory in another shape and layout."""
        return memory.reinterpret(memory.dtype, shape, layout)

elif hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def reinterpret(memory, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory in another shape and layout."""
        return memory._reinterpret(memory.dtype, shape, layout)

else:
    raise ImportError("this Triton has no way to see shared memory in another shape")
