"""How much work preemption does twice, and how wide the batch is, under different rules of admission and victims.

Runs the scheduler alone, without a model: `python benchmarks/admission.py [--out FILE]`. Decision 0001 reads from it.
"""

import argparse
import json
import logging
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from octavo.batch import StepResult
from octavo.config import EngineConfig
from octavo.engine import forecast
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import RequestState
from octavo.request import Request
from octavo.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny configuration is the tests'
from tests.tiny_config import engine_config, model_config

EOS = 7


class Newest(Scheduler):
    """The usual rule: whatever fits joins, the newest goes."""

    def _victim(self) -> RequestState:
        return max(self._requests.running, key=lambda state: state.order)

    def _fits_ahead(self, state: RequestState, owned_hits: int) -> bool:
        return True


class Cheapest(Scheduler):
    """Whatever fits joins, the cheapest to compute again goes."""

    def _fits_ahead(self, state: RequestState, owned_hits: int) -> bool:
        return True


# (prompt lengths, answer lengths, max_tokens asked for; None: exactly the answer's length)
LOADS: dict[str, tuple[tuple[int, int], tuple[int, int], int | None]] = {
    "short in, long out": ((16, 64), (64, 1024), None),
    "mixed": ((100, 1024), (100, 1024), None),
    "short in, ends early": ((16, 64), (64, 1024), 2000),
}
RULES: dict[str, tuple[type[Scheduler], float]] = {
    "newest goes": (Newest, 0.25),
    "cheapest goes": (Cheapest, 0.25),
    "look-ahead 0.25": (Scheduler, 0.25),
    "look-ahead 0.5": (Scheduler, 0.5),
    "look-ahead 1": (Scheduler, 1.0),
}


def config(num_blocks: int) -> EngineConfig:
    return engine_config(
        model_config(eos_token_ids=(EOS,)),
        max_model_len=4096,
        block_size=16,
        num_blocks=num_blocks,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    )


def simulate(rule: type[Scheduler], load: str, num_blocks: int, seed: int) -> dict[str, float]:
    """One run to the end; the answer's true length decides when EOS is drawn."""
    rng = random.Random(seed)
    prompts, answers, asked = LOADS[load]
    scheduler = rule(config(num_blocks))
    lengths = {}
    for i in range(400):
        prompt = [rng.randrange(10, 1000) for _ in range(rng.randint(*prompts))]
        lengths[str(i)] = rng.randint(*answers)
        scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens=asked or lengths[str(i)])))
    steps = tokens = rows = 0
    answered: Counter[str] = Counter()
    while (step := scheduler.schedule()) is not None:
        batch = step.whole()
        steps, tokens, rows = steps + 1, tokens + batch.num_tokens, rows + batch.num_rows
        plan = scheduler._steps[0]
        drawing = [*(plan.advance.members.sequences if plan.advance else []), *(seq for seq, _ in plan.samples)]
        names = [seq.request.request_id for seq in drawing]
        answered.update(names)
        drawn = [EOS if answered[name] >= lengths[name] else 0 for name in names]
        scheduler.update(StepResult(np.array(drawn, np.int32)))
    stats = scheduler.stats()
    useful = tokens - stats.wasted_tokens
    return {
        "preemptions": stats.preemptions,
        "wasted_percent": 100 * stats.wasted_tokens / useful,
        "steps": steps,
        "width": rows / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("octavo").setLevel(logging.ERROR)
    lines, rows = [], []
    for load in LOADS:
        for num_blocks in (256, 1024):
            for name, (rule, share) in RULES.items():
                forecast.SHARE_OF_MEAN = share
                runs = [simulate(rule, load, num_blocks, seed) for seed in (1, 2)]
                mean: dict[str, Any] = {key: sum(run[key] for run in runs) / 2 for key in runs[0]}
                rows.append({"load": load, "blocks": num_blocks, "rule": name} | mean)
                lines.append(
                    f"{load:22} {num_blocks:5} blocks  {name:16} {mean['preemptions']:6.0f} preemptions"
                    f" {mean['wasted_percent']:5.1f}% wasted {mean['steps']:7.0f} steps {mean['width']:5.1f} rows"
                )
                print(lines[-1], flush=True)
    lines.append(json.dumps({"benchmark": "admission", "rows": rows}))
    print(lines[-1])
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
