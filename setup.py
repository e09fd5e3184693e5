"""Builds the CPU kernels: one library for each instruction set, all from the same source.

They are plain C libraries, opened with ctypes. Without a compiler the installation succeeds all the same, and Octavo
runs on plain torch.
"""

import os
import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILDS = runpy.run_path(str(Path(__file__).parent / "octavo" / "kernels" / "builds.py"))


class BuildKernels(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        # All are made of one source, so each needs a folder of its own for its object.
        folder = str(Path(self.build_temp) / ext.name)
        objects = self.compiler.compile(ext.sources, output_dir=folder, extra_postargs=ext.extra_compile_args)
        library = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, library, extra_postargs=ext.extra_link_args, target_lang="c++")


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"octavo.kernels._kernels_{name}",
            ["octavo/kernels/csrc/kernels.cpp"],
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", *BUILDS["FLAGS"], *build.flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, build in BUILDS["builds_of"](platform.machine()).items()
    ],
)
