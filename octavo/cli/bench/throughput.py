"""`octavo bench throughput`: named workloads, or prompts of a given shape, greedy and with EOS ignored."""

import argparse
import time
from typing import Any

from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.workloads import WORKLOADS, Workload, fixed, workload
from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--work", metavar="NAMES", help=f"workloads, with commas between: {', '.join(WORKLOADS)} (default: all)"
    )
    group.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt, in place of --work")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    group.add_argument("--num-prompts", type=int, default=32, metavar="N", help="prompts (default: 32)")
    group.add_argument("--repeat", type=int, default=2, metavar="N", help="runs of each; the last counts (default: 2)")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    if arguments.input_len:
        shape = (arguments.num_prompts, arguments.input_len, arguments.output_len)
        works = {"x".join(map(str, shape)): fixed(*shape, high=1000)}
    else:
        names = arguments.work.split(",") if arguments.work else list(WORKLOADS)
        works = {name: workload(name) for name in names}

    from octavo.llm import LLM

    began = time.perf_counter()
    llm = LLM.from_options(from_args(EngineOptions, arguments))
    ready = time.perf_counter() - began
    rows = [measure(llm, name, work, arguments.repeat) for name, work in works.items()]
    print_table(rows)
    config = llm.engine.config
    print_json(
        {
            "benchmark": "throughput",
            "model": llm.options.model,
            "device": config.device,
            "dtype": config.dtype,
            "ready_s": round(ready, 3),
            "rows": rows,
        }
    )
    return 0


def measure(llm: Any, name: str, work: Workload, repeat: int) -> dict[str, Any]:
    """Runs a workload `repeat` times, the prefix cache empty each time; figures of the last run."""
    from octavo.sampling_params import SamplingParams

    prompts, lengths = work
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    seconds = 0.0
    for _ in range(repeat):
        llm.engine.scheduler.blocks.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert generated == sum(lengths), "EOS was to be ignored"
    given = sum(map(len, prompts))
    return {
        "work": name,
        "requests": len(prompts),
        "seconds": round(seconds, 3),
        "out_tok_s": round(generated / seconds, 1),
        "in_tok_s": round(given / seconds, 1),
    }
