"""`octavo bench fairness`: what one tenant's flood does to another's time to first token, in simulated time.

A quiet tenant asks now and then: alone, then beside a tenant whose requests all come at once and are far more than fit,
first come first served and with `--fair-share`.
"""

import argparse
import logging
import statistics
from random import Random
from typing import Any

from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.simulator import OPT_13B_SLOTS, Simulation, engine_config
from octavo.cli.bench.workloads import LENGTHS, drawn
from octavo.log import logger
from octavo.request import Request
from octavo.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--lengths", choices=list(LENGTHS), default="sharegpt", help="lengths (default: sharegpt)")
    group.add_argument("--quiet", type=int, default=100, metavar="N", help="requests of the one (default: 100)")
    group.add_argument("--flood", type=int, default=1000, metavar="N", help="requests of the other (default: 1000)")
    group.add_argument("--every", type=float, default=2.0, metavar="X", help="mean seconds between (default: 2.0)")
    group.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="(default: 256)")
    group.add_argument("--max-num-batched-tokens", type=int, default=512, metavar="N", help="(default: 512)")


def run(arguments: argparse.Namespace) -> int:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        rows = compare(
            arguments.lengths,
            arguments.quiet,
            arguments.flood,
            arguments.every,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        )
    finally:
        logger.setLevel(level)
    print_table(rows)
    print_json({"benchmark": "fairness", "lengths": arguments.lengths, "rows": rows})
    return 0


def compare(lengths: str, quiet: int, flood: int, every: float, **config: Any) -> list[dict[str, Any]]:
    """Figures of the quiet tenant: alone, beside a flood, and beside a flood with fair share."""
    alone = simulate(lengths, quiet, 0, every, fair_share=False, **config)
    rows = [alone]
    for fair in (False, True):
        rows.append(simulate(lengths, quiet, flood, every, fair_share=fair, **config))
    for row in rows:
        row["times_alone"] = round(row["p50_ms"] / alone["p50_ms"], 2)
    return rows


def simulate(lengths: str, quiet: int, flood: int, every: float, *, fair_share: bool, **config: Any) -> dict[str, Any]:
    """Time to first token of `quiet` requests that come `every` so many seconds beside `flood` at once."""
    simulation = Simulation(engine_config(OPT_13B_SLOTS, fair_share=fair_share, **config))
    random, arrival = Random(5), 1.0
    arrivals: dict[str, float] = {}
    for tenant, count, seed in (("flood", flood, 3), ("quiet", quiet, 4)):
        for i, (prompt, answer) in enumerate(zip(*drawn(lengths, count, seed), strict=True)):
            params = SamplingParams(max_tokens=answer, ignore_eos=True)
            arrival = 0.0 if tenant == "flood" else arrival + random.expovariate(1 / every)
            arrivals[f"{tenant}{i}"] = arrival
            simulation.add(Request(f"{tenant}{i}", prompt, params, tenant=tenant), arrival)
    simulation.run()
    waited = [1000 * (simulation.first_token[name] - came) for name, came in arrivals.items() if "quiet" in name]
    stats = simulation.scheduler.stats()
    return {
        "flood": flood,
        "fair_share": str(fair_share).lower(),
        "p50_ms": round(statistics.median(waited), 1),
        "p90_ms": round(statistics.quantiles(waited, n=10)[-1], 1),
        "seconds": round(simulation.now, 1),
        "preemptions": stats.preemptions,
        "recomputed_tokens": stats.wasted_tokens,
    }
