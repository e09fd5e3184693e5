"""What an int8 KV cache costs and saves in time, on a CPU: the same work with either cache, in turns.

`scripts/bench kv-cache benchmarks/kv_cache.py [--build NAME] [--work W,W] [--rounds N]`. `8x4096` are 32 decode steps
of 8 rows behind 4,096 tokens each, found in the prefix cache; other names are those of `octavo bench throughput`.
Weights are as the file has them. Attention's seconds are thread 0's; all figures are medians, ratios
those of the rounds.
"""

import argparse
import ctypes
import functools
import re
import time
from typing import Any

import numpy as np

from octavo import LLM, SamplingParams
from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.workloads import fixed, workload
from octavo.kernels import library

CACHES = ("auto", "int8")
STEPS = 32
WORK = ("1x8000", "8x4096", "mixed64", "prefill8x1024")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", help="of the kernels; the best by default")
    parser.add_argument("--work", type=lambda text: text.split(","), default=list(WORK))
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    library.load = functools.partial(library.load, asked.build)  # type: ignore[assignment]
    llms = {cache: LLM(kv_cache_dtype=cache) for cache in CACHES}
    print(llms["int8"].engine.executor.layout, flush=True)
    rows = []
    for name in asked.work:
        shape = re.fullmatch(r"(\d+)x(\d+)", name)
        prompts, lengths = fixed(int(shape[1]), int(shape[2]), STEPS) if shape else workload(name)
        turns: dict[str, list[tuple[float, float]]] = {cache: [] for cache in CACHES}
        if shape:
            for llm in llms.values():
                llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        for _ in range(asked.rounds):
            for cache, llm in llms.items():
                turns[cache].append(timed(llm, prompts, lengths, fresh=not shape))
        rows.append(row_of(name, sum(lengths), turns))
    print_table(rows)
    print_json({"benchmark": "kv-cache", "rows": rows})


def timed(llm: LLM, prompts: list[list[int]], lengths: list[int], *, fresh: bool) -> tuple[float, float]:
    """Seconds of the whole, and of attention."""
    if fresh:
        llm.engine.scheduler.blocks.reset_prefix_cache()
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    threads = llm.engine.executor.runner.forward.threads  # type: ignore[attr-defined]
    seconds = (ctypes.c_double * 7)()
    threads.kernels.profile(threads.address, seconds)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    whole = time.perf_counter() - began
    threads.kernels.profile(threads.address, None)
    return whole, seconds[library.ATTEND]


def row_of(name: str, generated: int, turns: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    (whole, attention), (whole8, attention8) = (np.median(turns[cache], axis=0) for cache in CACHES)
    ratio, attention_ratio = np.median(np.divide(turns["auto"], turns["int8"]), axis=0)
    return {
        "work": name,
        "tok_s": round(generated / whole, 1),
        "int8_tok_s": round(generated / whole8, 1),
        "ratio": round(ratio, 2),
        "attention_s": round(attention, 2),
        "int8_attention_s": round(attention8, 2),
        "attention_ratio": round(attention_ratio, 2),
    }


if __name__ == "__main__":
    main()
