"""What a step costs the host in which blocks run out, with hundreds of rows.

Runs the scheduler alone, without a model, two steps ahead as beside a GPU; whatever fits joins, so that somebody has to
give way in every third step. Milliseconds in `Scheduler.schedule`, medians of all steps of a kind.

    python benchmarks/preemption.py [--out FILE]
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from octavo.batch import Batch, StepResult
from octavo.engine.scheduler import Scheduler
from octavo.request import Request
from octavo.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny configuration is the tests'
from tests.tiny_config import engine_config, model_config

# (requests, samples of each, tokens that all prompts begin with, their own tokens, tokens to draw)
LOADS: dict[str, tuple[int, int, int, int, int]] = {
    "1,024 in, 128 out": (512, 1, 0, 1024, 128),
    "4 samples": (192, 4, 0, 1024, 768),
    "a common beginning": (640, 1, 896, 128, 768),
}
NUM_BLOCKS, MAX_ROWS = 23_400, 512


def scheduler_of(load: str, mode: str) -> Scheduler:
    config = engine_config(
        model_config(),
        max_model_len=8192,
        block_size=16,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=16384,
        num_host_blocks=4096,
        preemption_mode=mode,
    )
    scheduler = Scheduler(config)
    scheduler._fits_ahead = lambda state, owned_hits: True  # type: ignore[method-assign]
    random = Random(1)
    requests, samples, common, own, drawn = LOADS[load]
    first = [random.randrange(1000) for _ in range(common)]
    for i in range(requests):
        prompt = first + [random.randrange(1000) for _ in range(own)]
        scheduler.add(Request(str(i), prompt, SamplingParams(n=samples, ignore_eos=True, max_tokens=drawn)))
    return scheduler


def measure(load: str, mode: str) -> dict[str, Any]:
    scheduler = scheduler_of(load, mode)
    under_way: deque[Batch] = deque()
    preempting, others, rows = [], [], []
    while scheduler.has_work():
        while len(under_way) < 2:
            before, began = scheduler.stats().preemptions, time.perf_counter()
            step = scheduler.schedule()
            milliseconds = 1000 * (time.perf_counter() - began)
            if step is None:
                break
            under_way.append(step if isinstance(step, Batch) else scheduler.whole())
            if scheduler.stats().preemptions > before:
                preempting.append(milliseconds)
                rows.append(under_way[-1].num_rows)
            elif under_way[-1].num_tokens == under_way[-1].num_rows:
                others.append(milliseconds)
        scheduler.update(StepResult(np.zeros(len(under_way.popleft().sample_index), np.int32)))
    return {
        "load": load,
        "mode": mode,
        "rows": round(median(rows)),
        "preemptions": scheduler.stats().preemptions,
        "steps": len(preempting),
        "preempting_ms": round(median(preempting), 2),
        "others_ms": round(median(others), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("octavo").setLevel(logging.ERROR)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    lines, rows = [f"commit {commit.stdout.strip()}, {NUM_BLOCKS:,} blocks, at most {MAX_ROWS} rows"], []
    for load in LOADS:
        for mode in ("swap", "recompute"):
            rows.append(row := measure(load, mode))
            times = f"{row['preempting_ms']:6.2f} ms in these, {row['others_ms']:5.2f} in others of decoding alone"
            lines.append(
                f"{load:20} {mode:10} {row['rows']:4} rows {row['preemptions']:4} preemptions in {row['steps']:4} steps"
                f" {times}"
            )
    lines.append(json.dumps({"benchmark": "preemption", "rows": rows}))
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
