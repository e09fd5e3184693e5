"""`octavo bench latency`: one batch of equal prompts again and again: time to first token, and per token after it."""

import argparse
import itertools
import time
from typing import Any

from octavo.cli.bench import percentiles, print_json, print_table
from octavo.cli.bench.workloads import fixed
from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    group.add_argument("--input-len", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    group.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    group.add_argument("--repeat", type=int, default=5, metavar="N", help="batches after one to warm up (default: 5)")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    from octavo.llm import LLM
    from octavo.sampling_params import SamplingParams

    llm = LLM.from_options(from_args(EngineOptions, arguments))
    prompts, _ = fixed(arguments.batch_size, arguments.input_len, arguments.output_len, high=1000)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.output_len, ignore_eos=True)
    first, between, whole = [], [], []
    for i in range(arguments.repeat + 1):
        llm.engine.scheduler.blocks.reset_prefix_cache()
        times = _token_times(llm, prompts, params)
        if i:
            first.append(times[0])
            between += [later - earlier for earlier, later in itertools.pairwise(times)]
            whole.append(times[-1])
    figures = {"first token": first, "between tokens": between, "whole answer": whole}
    rows: list[dict[str, Any]] = [{"what": name, **percentiles(times)} for name, times in figures.items() if times]
    print_table(rows)
    print_json({"benchmark": "latency", "model": llm.options.model, "batch_size": arguments.batch_size, "rows": rows})
    return 0


def _token_times(llm: Any, prompts: list[list[int]], params: Any) -> list[float]:
    """Seconds from the start to each token of the first prompt."""
    began = time.perf_counter()
    return [
        time.perf_counter() - began for index, _, deltas in llm.stream(prompts, params) if index == 0 for _ in deltas
    ]
