"""What peers share: the beginning of prompts, and errors that name what to do."""

import json
import subprocess
import sys

import pytest

from octavo.cli.bench.peers import common_prefix


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # each keeps a token of its own
        ([[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]], 1),
        ([[7, 2], [1, 2]], 0),
        ([[1, 2, 9], [1, 3, 1], [1, 2, 1]], 1),
    ],
)
def test_what_prompts_begin_with(prompts: list[list[int]], length: int) -> None:
    assert common_prefix(prompts) == length


PROGRAM = """
from octavo.cli.bench.peers import UnusableError, serve

def open_engine(given):
    if given["model"] == "none":
        raise UnusableError("give another")
    prepared = []
    def prepare(prompts, lengths):
        prepared.append(prompts)
        return lambda: sum(lengths) + 100 * len(prepared)
    return prepare, {"engine": given["model"]}

serve(open_engine)
"""


def said(model: str, *asked: dict[str, object]) -> list[dict[str, object]]:
    command = [sys.executable, "-c", PROGRAM, json.dumps({"model": model})]
    lines = "".join(json.dumps(each) + "\n" for each in asked)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_workload_is_prepared_and_then_run() -> None:
    ready, first, second = said("m", *[{"prompts": [[1]], "lengths": [3]}] * 2)
    assert ready["about"] == {"engine": "m"}
    assert (first["generated"], second["generated"]) == (103, 203)


def test_a_peer_that_cannot_run_what_it_was_given_says_so() -> None:
    assert said("none") == [{"error": "give another"}]
