"""Opens mutants as users do: whatever is wrong with a model's files, it is said in one line, and soon."""

import argparse
import contextlib
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from octavo.cli.plan import make_plan
from octavo.cli.sampling import SamplingOptions
from octavo.config import EngineOptions, ServerOptions
from octavo.errors import OctavoError, RequestError
from octavo.llm import LLM
from octavo.sampling_defaults import sampling_params
from octavo.sampling_params import SamplingParams
from octavo.server.model import load_model
from octavo.text import template_sandbox
from tests.fuzz import mutants, workers
from tests.fuzz.originals import write_all

SECONDS = 40.0
# Originals are about 100 KB; an engine of one maps its cache, its threads' stacks and what torch takes at first.
MORE_BYTES = 3 << 29
CHAT = [{"role": "user", "content": "hello <|im_end|>"}]


def engine_options(path: Path) -> EngineOptions:
    return EngineOptions(
        model=str(path), device="cpu", kv_cache_memory=1 << 20, max_num_seqs=2, max_num_batched_tokens=64
    )


def open_front(path: Path) -> None:
    """As the HTTP process of `octavo serve`."""
    model = load_model(engine_options(path), ServerOptions())
    if model.is_chat:
        from octavo.text.chat_template import encode_chat

        encode_chat(model.tokenizer, CHAT)
        with contextlib.suppress(RequestError):  # a template need not show tools
            encode_chat(model.tokenizer, CHAT, tools=[{"type": "function"}])


def answer(path: Path) -> None:
    """As `octavo generate`."""
    llm = LLM.from_options(engine_options(path))
    try:
        params: list[Any] = [SamplingParams(max_tokens=3, temperature=0, logprobs=1)]
        params += [sampling_params(llm.sampling_defaults, SamplingOptions(max_tokens=3).given())]
        llm.generate(["hello", "hello"], params, use_tqdm=False)
        if llm.tokenizer.chat_template is not None:
            llm.chat(CHAT, SamplingParams(max_tokens=2), use_tqdm=False)
    finally:
        llm.shutdown()


def check(path: Path) -> str:
    """What is wrong with how the files at `path` are read; empty if nothing is."""
    steps = {
        "plan": lambda: make_plan(engine_options(path)),
        "front": lambda: open_front(path),
        "engine": lambda: answer(path),
    }
    faults = {name: fault for name, step in steps.items() if (fault := workers.fault_of(step, OctavoError))}
    return "; ".join(f"{name}: {fault}" for name, fault in faults.items())


@cache
def originals() -> dict[str, Path]:
    """Whole models, which stay until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="octavo-fuzz-")
    _KEPT.append(folder)
    return write_all(Path(folder.name))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def outcomes(seed: int, numbers: Iterable[int], *, quiet: bool = True) -> Iterator[tuple[workers.Outcome, str]]:
    """(outcome, what the mutant is) of each mutant."""
    whole = originals()
    logging.getLogger("octavo").setLevel(logging.ERROR)
    template_sandbox.MOST_SECONDS = 0.5  # of the ten that users wait for a template without end
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as folder:
        place = Path(folder) / "mutant"

        def case(number: int) -> str:
            return check(mutants.make(whole, place, seed, number).path)

        for outcome in workers.run(case, numbers, seconds=SECONDS, more_bytes=MORE_BYTES, quiet=quiet):
            what = mutants.make(whole, place, seed, outcome.number).what if outcome.fault else ""
            yield outcome, what


def add_to(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `files` to the kinds of `scripts/fuzz`."""
    parser = kinds.add_parser("files", help="damaged files of models and tokenizers")
    parser.add_argument("--mutants", type=int, default=5000, metavar="N", help="how many (default: 5000)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument("--only", type=int, metavar="N", help="the mutant N alone, with what it prints")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after so long")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    numbers = range(arguments.mutants) if arguments.only is None else [arguments.only]
    began, faults, slowest = time.monotonic(), Counter[str](), (0.0, 0)
    count = 0
    for outcome, what in outcomes(arguments.seed, numbers, quiet=arguments.only is None):
        count += 1
        slowest = max(slowest, (outcome.seconds, outcome.number))
        if outcome.fault:
            faults[outcome.fault.partition(":")[0]] += 1
            print(f"{what}\n    {outcome.fault}")
            print(f"    scripts/fuzz files --seed {arguments.seed} --only {outcome.number}", flush=True)
        if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
            print(f"stopped after {arguments.seconds:g} s")
            break
    print(
        f"{sum(faults.values())} of {count} mutants of seed {arguments.seed} are read wrongly,"
        f" in {time.monotonic() - began:.0f} s; the slowest, {slowest[1]}, took {slowest[0]:.1f} s"
    )
    return 1 if faults else 0
