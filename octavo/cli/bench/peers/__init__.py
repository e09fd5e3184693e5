"""Engines to compare with, each a program that answers lines of JSON; only the engine's own package is imported."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Computes what was prepared and gives the number of tokens that were generated: this is what is timed.
Run = Callable[[], int]
# From prompts as token ids, and tokens to generate of each; an engine may make room for them here.
Prepare = Callable[[list[list[int]], list[int]], Run]


class UnusableError(Exception):
    """The engine cannot run what it was given; the text says why, and what to give it."""


def serve(open_engine: Callable[[dict[str, Any]], tuple[Prepare, dict[str, Any]]]) -> None:
    """Opens the engine with the options in the first argument, then prepares and runs what comes, timing each run.

    The engine's own prints go to standard error; only answers go to standard output.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    began = time.perf_counter()
    try:
        prepare, about = open_engine(json.loads(sys.argv[1]))
    except ImportError as error:
        return answer({"error": f"{error.name or error} is not installed here; install it, or name --peer-python"})
    except UnusableError as error:
        return answer({"error": str(error)})
    answer({"ready_s": round(time.perf_counter() - began, 3), "about": about})
    for line in sys.stdin:
        asked = json.loads(line)
        run = prepare(asked["prompts"], asked["lengths"])
        began = time.perf_counter()
        generated = run()
        answer({"seconds": time.perf_counter() - began, "generated": generated})
    return None


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with alike, leaving each at least one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)
