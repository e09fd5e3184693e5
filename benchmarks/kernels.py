"""Matrix products on one core, each build that this processor can run against the others, in turns; where there are
tiles, the layers' products on two cores against what these do at most.

`scripts/bench kernels benchmarks/kernels.py`. Of one core the thread's own time is counted; what else runs on the
machine still slows it, so compare the best turns. Decisions 0090 and 0104 read from it.
"""

import time
from typing import Any

import limits
import numpy as np
import torch

from octavo.cli.bench import print_json, print_table
from octavo.kernels import library
from octavo.kernels.library import KernelThreads, Step
from octavo.kernels.weights import Packer, StoredRows
from octavo.ops.cpu.calls import Recorder
from octavo.ops.cpu.tape import Recording

TOKENS, INPUTS, OUTPUTS = 256, 1536, 1536
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    weight_OI, x_TI = torch.randn(OUTPUTS, INPUTS), torch.randn(TOKENS, INPUTS)
    rows = StoredRows("F32", (OUTPUTS, INPUTS), weight_OI.numpy().view(np.uint8).reshape(-1))
    cases: list[tuple[str, str, KernelThreads, Recording, list[float]]] = []
    for name in library.builds():  # those too that are never chosen on this maker's processors
        kernels = library.load(name)
        if kernels is None:
            continue
        threads = KernelThreads(kernels, 1)
        for precision in PRECISIONS:
            # Recorded, so that a product writes into memory that is there already.
            recorder = Recorder(threads)
            input_TI: Any = recorder.tape.new(2, INPUTS)
            output_TO: Any = recorder.linear(input_TI, Packer(threads, precision, 2**24).pack([rows]))
            recording = Recording(recorder.tape, [input_TI], output_TO, TOKENS, kernels)
            recording.inputs[0][:] = x_TI.numpy()
            cases.append((name, precision, threads, recording, []))
    for _ in range(ROUNDS):
        for _, _, threads, recording, seconds in cases:
            recording.run(threads, Step(tokens=TOKENS))
            began = time.process_time()
            recording.run(threads, Step(tokens=TOKENS))
            seconds.append(time.process_time() - began)
    work = 2 * TOKENS * INPUTS * OUTPUTS / 1e9
    table = [
        {
            "build": name,
            "precision": precision,
            "median_gop_s": round(work / float(np.median(seconds)), 1),
            "best_gop_s": round(work / min(seconds), 1),
        }
        for name, precision, _, _, seconds in cases
    ]
    print(f"{TOKENS} tokens, {INPUTS} inputs, {OUTPUTS} outputs, one thread, {ROUNDS} rounds\n")
    print_table(table)
    shares: list[dict[str, Any]] = []
    if tiles := library.load("amx"):
        print()
        shares = limits.measure(tiles, ROUNDS)
        print("the layers of SmolLM2-135M without attention, bfloat16; shares are of the limits in the same round\n")
        print_table(shares)
    print_json({"benchmark": "kernels", "rows": table, "shares": shares})


if __name__ == "__main__":
    main()
