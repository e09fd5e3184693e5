"""How much work preemption does twice, and how wide the batch is, under different rules of admission and victims.

Runs the scheduler alone, without a model: `python benchmarks/admission.py [--out FILE]`. Decision 0001 reads from it.
"""

import argparse
import json
import logging
import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np

from octavo.batch import Batch, StepResult
from octavo.config import EngineConfig
from octavo.engine import forecast
from octavo.engine.forecast import Forecast
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import Plan, RequestState
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


class MoreRoom(Scheduler):
    """Whoever gives way makes room for four more steps, so that the next one need not so soon."""

    def _make_room(self, plan: Plan) -> None:
        super()._make_room(plan)
        more = self._requests.num_rows * 4 // self._config.block_size
        while len(self._requests.running) > 1 and self._demand() + more > self.blocks.num_available:
            self._preempt(self._victim(), plan)


class Careful(Forecast):
    """The learned share, and all that must be, whatever that costs in width."""

    def pays_anyway(self, num_tokens: int, rows: int) -> bool:
        return False


class Share(Careful):
    """Looks ahead by the same share of the mean answer whatever ended it."""

    share = 0.25

    @property
    def growth(self) -> float:
        return self.share * self._mean


class Half(Share):
    share = 0.5


class Whole(Share):
    share = 1.0


class Counted(Careful):
    """As that, but the share goes with the part of the answers, not of their tokens, that reached a limit."""

    _part = 0.0

    def ended(self, num_output: int, at_limit: bool) -> None:
        super().ended(num_output, at_limit)
        self._part += forecast.MEMORY * (at_limit - self._part)

    @property
    def growth(self) -> float:
        return (forecast.SHARE_OF_MEAN + (1 - forecast.SHARE_OF_MEAN) * self._part) * self._mean


@dataclass
class Load:
    prompts: tuple[int, int]
    answers: tuple[int, int]
    asked: tuple[int, ...] = ()  # max_tokens, by turns; none: exactly the answer's length
    ignore_eos: bool = False  # then an answer is as long as it was asked for


LOADS = {
    "short in, long out": Load((16, 64), (64, 1024)),
    "mixed": Load((100, 1024), (100, 1024)),
    "short in, ends early": Load((16, 64), (64, 1024), (2000,)),
    "all reach 512": Load((16, 64), (1024, 1024), (512,)),
    "half reach 544": Load((16, 64), (64, 1024), (544,)),
    "limits of 64 and 2000": Load((16, 64), (64, 1024), (64, 2000)),
    "1,024 in, 128 reached": Load((1024, 1024), (1024, 1024), (128,)),
    "mixed, EOS ignored": Load((100, 1024), (100, 1024), ignore_eos=True),
}
# Whose victim, what is expected, and whether it is known that answers are as long as they may be where EOS is ignored.
# "learned where it pays" is the engine's.
RULES: dict[str, tuple[type[Scheduler], type[Forecast], bool]] = {
    "newest goes": (Newest, Forecast, False),
    "cheapest goes": (Cheapest, Forecast, False),
    "look-ahead 0.25": (Scheduler, Share, False),
    "look-ahead 0.5": (Scheduler, Half, False),
    "look-ahead 1": (Scheduler, Whole, False),
    "learned by answer": (Scheduler, Counted, False),
    "learned": (Scheduler, Careful, True),
    "learned where it pays": (Scheduler, Forecast, True),
    "and more room": (MoreRoom, Forecast, True),
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


def simulate(job: tuple[str, int, str, int]) -> dict[str, float]:
    """One run to the end; the answer's true length decides when EOS is drawn."""
    name, num_blocks, rule, seed = job
    logging.getLogger("octavo").setLevel(logging.ERROR)
    rng, load = random.Random(seed), LOADS[name]
    kind, forecast_kind, knows = RULES[rule]
    scheduler = kind(config(num_blocks))
    scheduler._forecast = scheduler._results._forecast = forecast_kind(256, forecast.TOKENS_OF_A_STEP["cpu"])
    lengths = {}
    for i in range(400):
        prompt = [rng.randrange(10, 1000) for _ in range(rng.randint(*load.prompts))]
        lengths[str(i)] = rng.randint(*load.answers)
        asked = load.asked[i % len(load.asked)] if load.asked else lengths[str(i)]
        scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens=asked, ignore_eos=load.ignore_eos)))
        if not knows:
            scheduler._requests.states[str(i)].min_len = len(prompt)
    steps = tokens = rows = stops = preemptions = 0
    answered: Counter[str] = Counter()
    while (step := scheduler.schedule()) is not None:
        batch = step if isinstance(step, Batch) else scheduler.whole()
        steps, tokens, rows = steps + 1, tokens + batch.num_tokens, rows + batch.num_rows
        stops += scheduler.stats().preemptions > preemptions
        preemptions = scheduler.stats().preemptions
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
        "stops": stops,
        "wasted_percent": 100 * stats.wasted_tokens / useful,
        "steps": steps,
        "width": rows / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jobs = [(*job, seed) for job in product(LOADS, (256, 1024), RULES) for seed in (1, 2)]
    lines, rows = [], []
    with Pool() as pool:
        runs = pool.imap(simulate, jobs)
        for load, num_blocks, rule, _ in jobs[::2]:
            pair = (next(runs), next(runs))
            mean: dict[str, Any] = {key: sum(run[key] for run in pair) / 2 for key in pair[0]}
            rows.append({"load": load, "blocks": num_blocks, "rule": rule} | mean)
            lines.append(
                f"{load:22} {num_blocks:5} blocks  {rule:21} {mean['preemptions']:6.0f} preemptions"
                f" in {mean['stops']:4.0f} steps {mean['wasted_percent']:5.1f}% wasted {mean['steps']:7.0f} steps"
                f" {mean['width']:5.1f} rows"
            )
            print(lines[-1], flush=True)
    lines.append(json.dumps({"benchmark": "admission", "rows": rows}))
    print(lines[-1])
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
