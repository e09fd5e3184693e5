"""The CPU's kernels: C++ for each instruction set (`csrc/`), a whole step of which runs in one call.

`library` opens the compiled code, `weights` packs matrices for it, `support` says whether it can run a model. No torch
here; `ops/cpu` makes ops of it.
"""
