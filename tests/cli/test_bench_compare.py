"""`octavo bench compare`: what counts of two engines' turns, and a peer that is not there."""

import importlib.util
import sys

import pytest

from octavo.cli.bench import compare
from octavo.errors import ConfigError


class Turns:
    """An engine whose runs take the given seconds, one after the other."""

    def __init__(self, precision, seconds):
        self.about = {"precision": precision}
        self.seconds = iter(seconds)

    def ask(self, prompts, lengths):
        return next(self.seconds)


def test_the_first_turn_does_not_count_and_medians_are_compared():
    ours, theirs = Turns("int8", [90.0, 2.0, 1.0, 3.0]), Turns("Q8_0", [90.0, 8.0, 8.0, 4.0])
    row = compare._compare("mixed", [[1] * 5, [2] * 7], [60, 40], ours, theirs, turns=3)
    assert row == {
        "work": "mixed",
        "precision": "int8",
        "octavo": 50.0,
        "peer": "Q8_0",
        "peer_tok_s": 12.5,
        "ratio": 4.0,
        "spread": 3.0,
    }


def test_where_one_token_is_generated_those_read_count():
    row = compare._compare("prefill", [[1] * 300] * 2, [1, 1], Turns("", [0.0, 2.0]), Turns("", [0.0, 3.0]), turns=1)
    assert (row["octavo"], row["peer_tok_s"]) == (300.0, 200.0)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="the peer is installed")
def test_a_peer_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match=r"llama_cpp is not installed here.*--peer-python"):
        compare._Contestant(sys.executable, "llama.cpp", {"model": "any.gguf", "threads": 1})
