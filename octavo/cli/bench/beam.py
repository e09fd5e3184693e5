"""`octavo bench beam`: beam search in the batch against an outer loop over `generate`, and the blocks that are shared.

The outer loop is what a client of an engine without beam search writes: for each token one call that asks for the
likeliest next tokens of every beam. It searches the same beams, so that its answers must be the same.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.workloads import LENGTHS, Workload, drawn
from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions
from octavo.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--lengths", choices=list(LENGTHS), default="alpaca", help="lengths drawn (default: alpaca)")
    group.add_argument("--num-prompts", type=int, default=16, metavar="N", help="prompts at once (default: 16)")
    group.add_argument("--max-output", type=int, metavar="N", help="cut the drawn answers to so many tokens")
    group.add_argument("--widths", default="2,4,6", metavar="NUMBERS", help="beam widths (default: 2,4,6)")
    group.add_argument("--samples", action="store_true", help="draw so many samples instead of searching")
    group.add_argument("--repeat", type=int, default=3, metavar="N", help="runs; the fastest counts (default: 3)")
    group.add_argument("--no-outer", action="store_true", help="leave the outer loop out")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    try:
        widths = [int(width) for width in arguments.widths.split(",")]
    except ValueError:
        raise ConfigError(f"widths is {arguments.widths!r}; it must be numbers with commas between") from None
    from octavo.llm import LLM

    llm = LLM.from_options(from_args(EngineOptions, arguments))
    prompts, lengths = drawn(arguments.lengths, arguments.num_prompts)
    work = prompts, [min(length, arguments.max_output or length) for length in lengths]
    rows = []
    for width in widths:
        outer = not arguments.samples and not arguments.no_outer
        rows.append(_row(llm, work, width, arguments.samples, outer, arguments.repeat))
    print_table(rows)
    config = llm.engine.config
    print_json(
        {
            "benchmark": "beam",
            "what": "samples" if arguments.samples else "beams",
            "model": llm.options.model,
            "device": config.device,
            "block_size": config.block_size,
            "lengths": arguments.lengths,
            "prompts": len(prompts),
            "mean_input": round(sum(map(len, work[0])) / len(prompts), 1),
            "mean_output": round(sum(work[1]) / len(prompts), 1),
            "rows": rows,
        }
    )
    return 0


def _row(llm: Any, work: Workload, width: int, samples: bool, outer: bool, repeat: int) -> dict[str, Any]:
    """Figures of one width; the two ways take turns, so that both see the same machine."""
    seconds, outer_seconds = [], []
    for _ in range(repeat):
        took, saved, answers = in_batch(llm, work, width, samples)
        seconds.append(took)
        if outer:
            outer_seconds.append(outer_loop(llm, work, width, answers))
    tokens = width * sum(work[1])
    row = {"width": width, "tokens": tokens, "seconds": round(min(seconds), 3)}
    row |= {"tok_s": round(tokens / min(seconds), 1), "saved_percent": round(100 * saved, 1)}
    if outer:
        row |= {"outer_s": round(min(outer_seconds), 3), "outer_tok_s": round(tokens / min(outer_seconds), 1)}
        row["times_faster"] = round(min(outer_seconds) / min(seconds), 2)
    return row


def in_batch(llm: Any, work: Workload, width: int, samples: bool) -> tuple[float, float, list[list[int]]]:
    """All prompts at once with `width` beams or samples: seconds, share of blocks saved, best answers."""
    from octavo.sampling_params import SamplingParams

    how: dict[str, Any] = {"n": width, "seed": 1} if samples else {"beam_width": width, "temperature": 0.0}
    params = [SamplingParams(max_tokens=length, ignore_eos=True, **how) for length in work[1]]
    llm.engine.scheduler.blocks.reset_prefix_cache()
    before = replace(llm.engine.stats())
    began = time.perf_counter()
    outputs = llm.generate(work[0], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    saved = llm.engine.stats().share_saved(before)
    return seconds, saved, [output.outputs[0].token_ids for output in outputs]


def outer_loop(llm: Any, work: Workload, width: int, answers: Sequence[list[int]]) -> float:
    """Seconds of the same searches as a client makes them; the best beams must be `answers`."""
    from octavo.sampling_params import SamplingParams

    llm.engine.scheduler.blocks.reset_prefix_cache()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=2 * width)
    # Of each prompt its beams, best first: (cumulative logprob, tokens).
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, list(prompt))] for prompt in work[0]]
    began = time.perf_counter()
    for step in range(max(work[1])):
        open_prompts = [i for i, length in enumerate(work[1]) if step < length]
        asked = [(i, beam) for i in open_prompts for beam in beams[i]]
        outputs = llm.generate([tokens for _, (_, tokens) in asked], params, use_tqdm=False)
        grown: dict[int, list[tuple[float, list[int]]]] = {i: [] for i in open_prompts}
        for (i, (total, tokens)), output in zip(asked, outputs, strict=True):
            likeliest = output.outputs[0].logprobs[0]
            grown[i] += [(total + found.logprob, [*tokens, token]) for token, found in likeliest.items()]
        for i in open_prompts:
            beams[i] = sorted(grown[i], key=lambda beam: -beam[0])[:width]
    seconds = time.perf_counter() - began
    for i, (prompt, found) in enumerate(zip(work[0], beams, strict=True)):
        assert found[0][1][len(prompt) :] == answers[i], f"the outer loop answers prompt {i} differently"
    return seconds
