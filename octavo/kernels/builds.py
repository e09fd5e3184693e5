"""The builds of the kernels, the best first: what a compiler is told for each, and what a processor must have for it.

`setup.py` and `scripts/test-kernels` read it too, without Octavo being installed, so it imports nothing of Octavo.
"""

from typing import NamedTuple


class Build(NamedTuple):
    """`machines` as `platform.machine()` says it; `needs` in the words of /proc/cpuinfo. With a `maker` (`vendor_id`
    there) the build is chosen on that maker's processors alone, though others may run it."""

    machines: tuple[str, ...]
    flags: tuple[str, ...]
    needs: tuple[str, ...]
    maker: str | None = None


_AVX512_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c")

# Intel's cores have bf16 products too, but do fewer of them in a second than of fp32's: hence the maker.
BUILDS = {
    "amx": Build(
        ("x86_64",),
        (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        (*_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    ),
    "avx512_bf16": Build(
        ("x86_64",),
        (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"),
        (*_AVX512, "avx512_vnni", "avx512_bf16"),
        "AuthenticAMD",
    ),
    "avx512_vnni": Build(("x86_64",), (*_AVX512_FLAGS, "-mavx512vnni"), (*_AVX512, "avx512_vnni")),
    "avx512": Build(("x86_64",), _AVX512_FLAGS, _AVX512),
    "avx2": Build(("x86_64",), ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma", "f16c")),
    "neon_dotprod": Build(("aarch64",), ("-march=armv8.2-a+dotprod",), ("asimddp",)),
    "generic": Build(("x86_64", "aarch64"), (), ()),
}

# Contraction is the compiler's choice from place to place, and a sum must not depend on where it is computed.
FLAGS = ("-std=c++20", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-Wno-maybe-uninitialized")


def name_of(machine: str) -> str:
    """The one name of a machine that has several."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())


def builds_of(machine: str) -> dict[str, Build]:
    """The builds for a machine by any of its names; empty for one that is not known."""
    return {name: build for name, build in BUILDS.items() if name_of(machine) in build.machines}
