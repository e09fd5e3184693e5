"""Microseconds of a draw with filters and without, alone in a CUDA graph, beside torch's.

Peaked logits have 40 tokens that hold nearly everything, flat ones are normal with a deviation of 1 or 3. torch's draw
waits for the device, so no graph can have it; it is timed as it is called.

    python benchmarks/gpu_sampling.py
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from octavo.batch import SamplingColumns
from octavo.ops.triton.sampling import Asked, draw
from octavo.runner import noise, sampler

VOCABULARY = 151_936
FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k 20": {"top_k": 20},
    "top_k 200": {"top_k": 200},
    "top_p 0.95": {"top_p": 0.95},
    "top_p 0.8": {"top_p": 0.8},
    "both": {"top_k": 20, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
}
CALLS = 10


def logits(kind: str, rows: int) -> torch.Tensor:
    made = torch.randn(rows, VOCABULARY, device="cuda")
    if kind == "flat 3":
        made *= 3
    elif kind == "peaked":
        some = torch.randint(VOCABULARY, (rows, 40), device="cuda")
        made.scatter_(1, some, 18 + 3 * torch.randn(rows, 40, device="cuda"))
    return made.bfloat16()


def columns(rows: int, filters: dict[str, float]) -> SamplingColumns:
    return SamplingColumns(
        temperature=np.full(rows, 0.8, np.float32),
        top_k=np.full(rows, filters.get("top_k", 0), np.int32),
        top_p=np.full(rows, filters.get("top_p", 1.0), np.float32),
        min_p=np.full(rows, filters.get("min_p", 0.0), np.float32),
        seed=np.arange(rows, dtype=np.uint64),
        counter=np.zeros(rows, np.int32),
        num_logprobs=np.full(rows, -1, np.int32),
    )


def microseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of a call's, the device's own time if it is never waited for."""
    took = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        took.append(1e3 * began.elapsed_time(ended))
    return statistics.median(took)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` of it in a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def measure(kind: str, rows: int, name: str, repeats: int) -> dict[str, Any]:
    chosen = columns(rows, FILTERS[name])
    logits_SV = logits(kind, rows)
    states = noise.states(chosen.seed, chosen.counter).view(np.int64)
    arrays = (states, chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
    asked = Asked(*(torch.tensor(array, device="cuda") for array in arrays))
    out = torch.empty(rows, dtype=torch.int32, device="cuda")
    draws = recorded(lambda: draw(logits_SV, asked, VOCABULARY, out))
    found: dict[str, Any] = {"logits": kind, "rows": rows, "filters": name}
    found["octavo"] = round(microseconds(draws, repeats) / CALLS, 1)
    draws()
    drawn = out.tolist()
    expected: list[int] = []

    def in_torch() -> None:
        expected[:] = sampler.draw(logits_SV.float(), chosen).tolist()

    in_torch()
    found["torch"] = round(microseconds(in_torch, max(3, repeats // 10)), 1)
    found["differ"] = sum(one != other for one, other in zip(drawn, expected, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--logits", nargs="+", default=["peaked", "flat 1", "flat 3"])
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, {VOCABULARY} tokens, bf16; us a call; differ: tokens unlike torch's\n")
    print(f"{'logits':<8}{'rows':>5}  {'filters':<12}{'octavo':>9}{'torch':>9}{'differ':>8}")
    for kind in args.logits:
        for rows in args.rows:
            for name in FILTERS:
                line = measure(kind, rows, name, args.repeats)
                print(
                    f"{kind:<8}{rows:>5}  {name:<12}{line['octavo']:>9}{line['torch']:>9}{line['differ']:>8}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
