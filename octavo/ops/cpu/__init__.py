"""The CPU's kernels: C++ for each instruction set (`csrc/`), a whole step of which runs in one call.

`library` opens the compiled code, `weights` packs, `calls` gives the ops of `octavo.ops` and records a model's step,
`tape` replays it.
"""
