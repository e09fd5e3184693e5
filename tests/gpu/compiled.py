"""Compiles every Triton kernel for GPUs that are not here, and says which cannot be compiled or ask for too much.

Nothing is launched, so that no GPU is needed; results are not looked at.

    python -m tests.gpu.compiled 90

for sm_90; `scripts/compile-kernels` does so for all architectures with several versions of Triton.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.ops import reference
from octavo.ops.triton import TritonOps, fp8, hopper, hopper_kernels, prepare, tiles
from tests.ops import kernel_cases as cases
from tests.ops import sampling_cases

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes of shared memory that a program may have.
ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
DTYPES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
HEADS = ((32, 8, 128), (9, 3, 64))
ROWS = ([(1, 1), (70, 1), (300, 1)], [(5, 1), (70, 1), (40, 40), (75, 12)], [(200, 200)])


class NoGpu:
    """Stands for the driver of a GPU of one architecture."""

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


class Compiled:
    """What was compiled for one architecture: kernels, the times that it took, and what went wrong, by kernel."""

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.seconds: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)
        self.faults: dict[str, str] = {}
        self._seen: set[Any] = set()

    def launch(self, run: Callable[..., Any], function: JITFunction, *args: Any, grid: Any, **named: Any) -> Any:
        """In place of `JITFunction.run`."""
        name = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"
        named.pop("warmup", None)
        began = time.monotonic()
        try:
            kernel = run(function, *args, grid=grid, warmup=True, **named)
        except Exception as error:
            self.faults.setdefault(name, _innermost(error))
            return None
        self.seconds[name] += time.monotonic() - began
        if id(kernel) not in self._seen:
            self._seen.add(id(kernel))
            self.count[name] += 1
            if kernel.metadata.shared > ROOM[self.architecture]:
                self.faults.setdefault(name, f"asks for {kernel.metadata.shared} bytes of shared memory")
        return kernel


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def launches(architecture: int, dtypes: tuple[torch.dtype, ...]) -> Iterator[Callable[[], None]]:
    """What launches every kernel that a GPU of this architecture has a use for."""
    ops, invariant = TritonOps(CPU), TritonOps(CPU, 64)
    in_fp8 = (False, True) if architecture >= 89 else (False,)
    for dtype in dtypes:
        yield partial(cases.check_norms, ops, CPU, dtype, 3, 1024)
        for heads in HEADS:
            for norm in (False, True):
                yield partial(cases.check_rope, ops, CPU, dtype, heads, heads[2], norm=norm)
            for rows, which in product(ROWS, (ops, invariant)):
                yield partial(cases.check_attention, which, CPU, dtype, heads, rows)
            yield partial(cases.check_attention, ops, CPU, dtype, heads, ROWS[1], 9, 3.0)
            yield partial(cases.check_turned, ops, CPU, dtype, heads, [1, 16, 300], heads[2], norm=True)
            yield partial(cases.check_shared, ops, CPU, dtype, heads, [(5, 32), (70, 16)])
        for which, rows in product(in_fp8, (1, 8, 40, 130)):
            yield partial(cases.check_fused, ops, CPU, dtype, rows, 1024, 1024, in_fp8=which)
            yield partial(cases.check_linear, ops, CPU, dtype, rows, 1024, 1024, in_fp8=which)
            yield partial(cases.check_linear, invariant, CPU, dtype, rows, 1024, 1024, in_fp8=which)
        yield partial(cases.check_added, ops, CPU, dtype, 130, 1024, 1024)
        yield partial(sampling_cases.check_mixed, dtype, 9000, CPU)
    if len(in_fp8) > 1:
        yield partial(cases.check_attention, ops, CPU, torch.bfloat16, HEADS[0], ROWS[1], kv=torch.float8_e4m3fn)
        yield partial(cases.check_fp8_cache, CPU, torch.bfloat16, HEADS[0], bound=0.0)
    yield partial(sampling_cases.check_penalties, CPU)
    yield partial(cases.check_steps, CPU)
    yield _check_end_of_step
    yield partial(cases.check_clear, CPU)


def _check_end_of_step() -> None:
    ints = torch.zeros(64, dtype=torch.int32)
    prepare.publish(ints[:4], ints[:2], ints.view(8, 8))
    prepare.spread(ints, ints[:1], ints.view(8, 8))
    prepare.look_up(ints[:4], ints)


def compile_for(architecture: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Compiled:
    """Everything for one architecture; one a process, since ops keep what they know of a device."""
    compiled = Compiled(architecture)
    tiles._capability_of_cpu = (architecture // 10, architecture % 10)
    driver.set_active(NoGpu(architecture))
    kinds = {JITFunction}
    with suppress(ImportError):
        from triton.experimental.gluon._runtime import GluonJITFunction

        kinds.add(GluonJITFunction)
    for kind in kinds:
        if "run" in vars(kind):
            run = kind.run
            kind.run = lambda self, *args, run=run, **named: compiled.launch(run, self, *args, **named)
    # Results are those of kernels that never ran.
    cases.close = cases.near = lambda found, expected: None
    reference.paged_attention = lambda q, *rest, **named: q
    hopper.fills = lambda *args: True
    hopper_kernels.MEASURED = (triton.__version__.rpartition(".")[0],)
    fp8.torch._scaled_mm = lambda x, w, *, out_dtype, **rest: torch.empty(len(x), w.shape[1], dtype=out_dtype)
    for launch in launches(architecture, dtypes):
        with suppress(AssertionError):
            launch()
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(prog="compiled")
    parser.add_argument("architecture", type=int, choices=ARCHITECTURES, help="compute capability, as in sm_90")
    parser.add_argument("--bf16", action="store_true", help="the kernels of bf16 alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = compile_for(arguments.architecture, DTYPES[:1] if arguments.bf16 else DTYPES)
    count, seconds = sum(found.count.values()), sum(found.seconds.values())
    if arguments.json:
        print(json.dumps({"kernels": dict(found.count), "faults": found.faults, "seconds": seconds}))
    else:
        what = f"Triton {triton.__version__:6} sm_{arguments.architecture:<4}"
        print(f"{what} {len(found.count)} kernels, {count} variants, {seconds:.0f} s, {len(found.faults)} faults")
        for name, fault in found.faults.items():
            print(f"  {name:32} {fault}")
    raise SystemExit(bool(found.faults))


if __name__ == "__main__":
    main()
