"""Builds the CPU kernels: one library for each instruction set, all from the same source.

They are plain C libraries, opened with ctypes. Without a compiler the installation succeeds all the same, and Octavo
runs on plain torch.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# The names are those of octavo/kernels/library.py.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512": AVX512,
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "generic": [],
    },
    "aarch64": {"neon_dotprod": ["-march=armv8.2-a+dotprod"], "generic": []},
}
INSTRUCTION_SETS["amd64"] = INSTRUCTION_SETS["x86_64"]
INSTRUCTION_SETS["arm64"] = INSTRUCTION_SETS["aarch64"]
# Contraction is the compiler's choice from place to place, and a sum must not depend on where it is computed.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-g0",
]


class BuildKernels(build_ext):
    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # there is no PyInit function


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"octavo.kernels._kernels_{name}",
            ["octavo/kernels/csrc/kernels.cpp"],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.get(platform.machine().lower(), {}).items()
    ],
)
