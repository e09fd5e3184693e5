"""Engines to compare with, each a program that answers lines of JSON; only the engine's own package is imported."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# From (prompts as token ids, tokens to generate of each) to the number of tokens that were generated.
Run = Callable[[list[list[int]], list[int]], int]


def serve(open_engine: Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]) -> None:
    """Opens the engine with the options in the first argument, then runs what comes, timing each run.

    The engine's own prints go to standard error; only answers go to standard output.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    began = time.perf_counter()
    try:
        run, about = open_engine(json.loads(sys.argv[1]))
    except ImportError as error:
        return answer({"error": f"{error.name or error} is not installed here; install it, or name --peer-python"})
    answer({"ready_s": round(time.perf_counter() - began, 3), "about": about})
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        generated = run(asked["prompts"], asked["lengths"])
        answer({"seconds": time.perf_counter() - began, "generated": generated})
    return None
