"""Answers that go round in circles, against the plain definition of it, and what their reader gets."""

import random

import pytest

from octavo.request import Request
from octavo.sampling_params import RepetitionDetectionParams, SamplingParams
from octavo.text.output import RequestText
from octavo.text.repetition import repeats
from octavo.text.tokenizer import Tokenizer
from tests.server.double import byte_tokenizer

TOKENIZER: Tokenizer = byte_tokenizer()


def plainly(tokens: list[int], least: int, most: int, times: int) -> bool:
    return any(
        len(tokens) >= size * times and tokens[-size * times :] == tokens[-size:] * times
        for size in range(max(1, least), most + 1)
    )


def test_it_is_what_it_says():
    random_numbers = random.Random(3)
    found = 0
    for _ in range(3000):
        pattern = [random_numbers.randrange(3) for _ in range(random_numbers.randint(1, 6))]
        tokens = [random_numbers.randrange(3) for _ in range(random_numbers.randint(0, 4))]
        tokens += pattern * random_numbers.randint(1, 5) + pattern[: random_numbers.randrange(len(pattern) + 1)]
        least, times = random_numbers.randint(0, 3), random_numbers.randint(2, 4)
        most = random_numbers.randint(max(1, least), 7)
        params = RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=times)
        assert repeats(tokens, params) == plainly(tokens, least, most, times)
        found += repeats(tokens, params)
    assert 500 < found < 2500


@pytest.mark.parametrize(
    ("text", "expected"), [("I see, I see, I see, I see", "I see, I see, I see, "), ("aaaaaa", "aaa")]
)
def test_an_answer_ends_where_it_repeats_itself(text: str, expected: str):
    params = SamplingParams(repetition_detection={"max_pattern_size": 8, "min_count": 3}, stop=["no"])
    told = RequestText(Request("r", [5], params), TOKENIZER)
    deltas = [told.push(("r", 0, token, None, None, None)) for token in TOKENIZER.encode(text)]
    (ending,) = [delta for delta in deltas if delta.finish_reason]
    assert (ending.finish_reason, ending.abort) == ("repetition", True)
    output = told.result().outputs[0]
    assert output.text == "".join(delta.text for delta in deltas) == expected
    assert output.finish_reason == "repetition"
    assert TOKENIZER.decode(output.token_ids) == expected


def test_nobody_is_ended_who_did_not_ask():
    told = RequestText(Request("r", [5], SamplingParams()), TOKENIZER)
    assert all(told.push(("r", 0, 65, None, None, None)).finish_reason is None for _ in range(300))
