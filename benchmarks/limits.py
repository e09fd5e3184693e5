"""The layers' products in bf16 on all cores, as shares of what these cores do at most (`limits.cpp`).

Part of `benchmarks/kernels.py`. The limits are measured in the same rounds, since the machine's pace changes.
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from octavo.kernels.builds import BUILDS
from octavo.kernels.library import Kernels, KernelThreads, Step
from octavo.kernels.weights import Packer, StoredRows
from octavo.ops.cpu.calls import Recorder
from octavo.ops.cpu.tape import TOKENS, Recording

CORES = 2
BATCHES = (1, 8, 64, 256)
LAYERS, D, QKV, F = 30, 576, 960, 1536  # SmolLM2-135M
WEIGHTS = LAYERS * (D * QKV + D * D + 3 * D * F)
STEPS, READ = 400_000, WEIGHTS * 2 // 512 * 512


def measure(kernels: Kernels, rounds: int) -> list[dict[str, Any]]:
    """A line a batch: the layers without attention, their rate and its share of the limit in the same round."""
    limits = _limits()
    threads = KernelThreads(kernels, CORES)
    recording = _layers(threads)
    buffer = np.ones(READ, np.uint8)
    share = READ // CORES
    flops: list[float] = []
    reads: list[float] = []
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    with ThreadPoolExecutor(CORES) as pool:

        def on_all(work: Callable[[int], object]) -> float:
            began = time.perf_counter()
            list(pool.map(work, range(CORES)))
            return time.perf_counter() - began

        for _ in range(rounds):
            flops.append(STEPS * CORES * 4 * 16 * 16 * 32 * 2 / on_all(lambda _: limits.multiply_in_registers(STEPS)))
            read = [on_all(lambda core: limits.read_once(buffer.ctypes.data + core * share, share)) for _ in range(3)]
            reads.append(READ / min(read))
            for batch in BATCHES:
                began = time.perf_counter()
                recording.run(threads, Step(tokens=batch))
                seconds[batch].append(time.perf_counter() - began)
    rows = []
    for batch in BATCHES:
        rate = 2 * batch * WEIGHTS / np.array(seconds[batch])
        read = 2 * WEIGHTS / np.array(seconds[batch])
        rows.append(
            {
                "tokens": batch,
                "best_ms": round(min(seconds[batch]) * 1e3, 2),
                "tflop_s": round(float(np.median(rate)) / 1e12, 2),
                "of_registers": round(float(np.median(rate / flops)), 2),
                "weights_gb_s": round(float(np.median(read)) / 1e9, 1),
                "of_reading": round(float(np.median(read / reads)), 2),
            }
        )
    for what, found, unit in (("products from registers", flops, "TFLOP/s"), ("reading", reads, "GB/s")):
        one = 1e12 if unit == "TFLOP/s" else 1e9
        print(f"limit of {CORES} cores, {what}: {np.median(found) / one:.2f} {unit}, best {max(found) / one:.2f}")
    return rows


def _limits() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the limits are measured in C++, and there is no compiler"
    source = Path(__file__).with_name("limits.cpp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "limits.so"
        flags = ["-O2", "-std=c++20", "-fPIC", "-shared", *BUILDS["amx"].flags]
        subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))
    library.multiply_in_registers.argtypes = (ctypes.c_int64,)
    library.read_once.argtypes, library.read_once.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    return library


def _layers(threads: KernelThreads) -> Recording:
    """The layers of a model without its attention, recorded as they are in a step."""
    rng = np.random.default_rng(0)
    packer = Packer(threads, "bfloat16", 2 * WEIGHTS + 2**20)

    def matrix(outputs: int, inputs: int) -> Any:
        rows = rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
        return packer.pack([StoredRows("F32", (outputs, inputs), rows.view(np.uint8).reshape(-1))])

    recorder = Recorder(threads)
    norm: Any = np.ones(D, np.float32)
    x_TD: Any = recorder.tape.new(TOKENS, D)
    a_TD, stream_TD = recorder.rms_norm(x_TD, norm, 1e-5), x_TD
    for _ in range(LAYERS):
        q_TD = recorder.linear(a_TD, matrix(QKV, D))[:, :D]
        a_TD, stream_TD = recorder.add_rms_norm(recorder.linear(q_TD, matrix(D, D)), stream_TD, norm, 1e-5)
        gated_TF = recorder.silu_mul(recorder.linear(a_TD, matrix(2 * F, D)))
        a_TD, stream_TD = recorder.add_rms_norm(recorder.linear(gated_TF, matrix(D, F)), stream_TD, norm, 1e-5)
    recording = Recording(recorder.tape, [x_TD], a_TD, max(BATCHES), threads.kernels)
    recording.inputs[0][:] = rng.standard_normal((max(BATCHES), D), np.float32)
    return recording
