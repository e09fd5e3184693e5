"""`octavo bench memory`: a trace through the real scheduler and block manager without a model, beside contiguous ones.

All requests wait at the start, so that memory alone bounds the batch.
"""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.contiguous import RESERVES, Contiguous
from octavo.cli.bench.simulator import A100_OPT_13B, OPT_13B_SLOTS, Simulation, engine_config
from octavo.cli.bench.workloads import LENGTHS, drawn
from octavo.log import logger
from octavo.metrics import EngineStats
from octavo.request import Request
from octavo.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--lengths", choices=list(LENGTHS), default="sharegpt", help="lengths (default: sharegpt)")
    group.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="requests (default: 1000)")
    group.add_argument("--seed", type=int, default=3, metavar="N", help="seed of the lengths (default: 3)")
    group.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a block (default: 16)")
    group.add_argument(
        "--kv-tokens", type=int, default=OPT_13B_SLOTS, metavar="N", help="memory in tokens (default: %(default)s)"
    )


@dataclass(slots=True)
class Figures:
    """Sums over the steps of a run. While nobody waits the batch runs empty, and its memory is not looked at."""

    slots: int  # all there are
    held: int = 0
    stored: int = 0
    steps: int = 0
    requests: int = 0
    max_batch: int = 0

    def step(self, requests: int, stored: int, held: int, waiting: bool) -> None:
        """Notes a step with `held` slots that belong to requests, `stored` of them with a token."""
        self.max_batch = max(self.max_batch, requests)
        if waiting:
            self.steps += 1
            self.held += held
            self.stored += stored
            self.requests += requests

    def row(self, name: str, served: int, seconds: float) -> dict[str, Any]:
        return {
            "memory": name,
            "waste_percent": round(100 * (1 - self.stored / self.held), 2),
            "tokens_percent": round(100 * self.stored / (self.steps * self.slots), 1),
            "max_batch": self.max_batch,
            "mean_batch": round(self.requests / self.steps, 1),
            "requests_per_s": round(served / seconds, 3),
        }


def run(arguments: argparse.Namespace) -> int:
    prompts, answers = drawn(arguments.lengths, arguments.num_prompts, arguments.seed)
    level = logger.level
    logger.setLevel(logging.WARNING)  # preemptions are part of the run, and not news
    try:
        rows = [octavo(prompts, answers, arguments.kv_tokens, arguments.block_size)]
    finally:
        logger.setLevel(level)
    shapes = [(len(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    rows += [contiguous(name, shapes, arguments.kv_tokens) for name in RESERVES]
    print_table(rows)
    wanted = ("waste_percent", "max_batch", "requests_per_s")
    print_json({row["memory"]: {name: row[name] for name in wanted} for row in rows})
    return 0


def octavo(prompts: list[list[int]], answers: list[int], num_tokens: int, block_size: int = 16) -> dict[str, Any]:
    """Figures of the scheduler itself, as it runs in the engine."""
    simulation = Simulation(engine_config(num_tokens, block_size))
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        simulation.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=answer, ignore_eos=True)))
    figures = Figures(num_tokens)

    def watch(stats: EngineStats) -> None:
        figures.step(stats.running, stats.stored_tokens, stats.blocks_owned * block_size, stats.waiting > 0)

    simulation.run(watch)
    return figures.row("octavo", len(prompts), simulation.now)


def contiguous(name: str, shapes: list[tuple[int, int]], num_tokens: int) -> dict[str, Any]:
    """Figures of one of `RESERVES` for requests of (prompt, answer) tokens."""
    budget = engine_config(num_tokens).max_num_batched_tokens
    memory = Contiguous(num_tokens, RESERVES[name], A100_OPT_13B, budget)
    figures = Figures(num_tokens)
    memory.run(shapes, figures.step)
    return figures.row(name, len(shapes), memory.now)
