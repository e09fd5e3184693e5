"""Some hundred requests of the grammar to a real server; `scripts/fuzz requests` sends any number."""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.requests import KINDS, NESTED_KINDS, RULES, Raw, encode, request, valid_body
from tests.fuzz.run_requests import OPTIONS, FaultError, Fuzz, check
from tests.served import Answer, Served, save_tiny_model

SEED = 20
SECONDS = 45.0


@pytest.mark.parametrize("kind", [*KINDS.values(), *NESTED_KINDS], ids=lambda kind: kind.__name__)
def test_every_field_has_a_rule(kind: type):
    assert set(kind.model_fields) <= set(RULES)


def test_a_request_is_made_by_seed_and_number_alone():
    assert request(1, 77) == request(1, 77)
    assert request(1, 77) != request(2, 77)
    kinds = Counter(request(1, number).what.split()[0].strip(":,") for number in range(1000))
    assert set(kinds) == {"valid", "by", "odd", "body", "HTTP"}
    assert kinds["valid"] > 300


def test_each_field_is_sent_with_valid_values_and_odd_ones():
    made = [request(1, number) for number in range(4000)]
    names = {name for kind in KINDS.values() for name in kind.model_fields}
    assert {name for one in made if one.valid for name in one.body} == names
    assert names <= {one.what.partition(" ")[2].partition(",")[0] for one in made if one.what.startswith("odd ")}


def test_values_that_no_encoder_writes():
    assert encode({"a": Raw("1e400"), ("a", 1): [None, Raw("NaN")]}) == '{"a":1e400,"a":[null,NaN]}'


ERROR = b'{"error": {"message": "%s", "type": "invalid_request_error", "param": null, "code": null}}'
CHOICE = b'{"choices": [{"index": 0, "finish_reason": %s}]}'
EVENT = b"data: " + CHOICE % b"null" + b"\n\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(500, body=ERROR % b"x", ended=True), "status 500"),
        (Answer(400, body=b"bad", ended=True), "not JSON"),
        (Answer(400, body=ERROR % b"x\\ny", ended=True), "not one line"),
        (Answer(400, body=ERROR % (b"x" * 5000), ended=True), "5000 characters"),
        (Answer(400, body=ERROR % b"x", ended=True), "a valid request is refused"),
        (Answer(400, body=b'{"error": "x"}', ended=True), "OpenAI's shape"),
        (Answer(200, body=CHOICE % b"null", ended=True), "ended with None"),
        (Answer(200, body=CHOICE % b"NaN", ended=True), "NaN"),
        (Answer(200, body=CHOICE % b'"stop"'), "broke off"),
        (
            Answer(200, {"content-type": "text/event-stream"}, EVENT + b"data: [DONE]\n\n", True),
            "choices ended with",
        ),
        (Answer(200, {"content-type": "text/event-stream"}, EVENT + b"data: " + ERROR % b"x" + b"\n\n", True), "ended"),
        (Answer(200, {"content-type": "text/event-stream"}, EVENT, True), "OpenAI's shape"),
        (Answer(200, {"content-type": "text/event-stream"}, b"", True), "empty"),
    ],
)
def test_an_answer_that_is_wrong_is_a_fault(answer: Answer, words: str):
    asked = next(one for one in (request(1, i) for i in range(99)) if one.valid and one.path == "/v1/completions")
    with pytest.raises(FaultError, match=words):
        check(asked, answer)


def test_a_valid_body_is_what_the_protocol_takes():
    for number in range(300):
        for path, kind in KINDS.items():
            body = valid_body(random.Random(number), path)
            kind.model_validate_json(encode(body)).check()  # type: ignore[attr-defined]


@pytest.mark.faults
def test_a_server_stands_all_requests(tmp_path: Path):
    server = Served(save_tiny_model(tmp_path), tmp_path / "log", *OPTIONS)
    try:
        told: list[str] = []
        fuzz = Fuzz(server, SEED, told.append)
        asyncio.run(fuzz.run(range(640), time.monotonic() + SECONDS))
        assert not told, "\n".join(told)
        assert fuzz.outcomes.valid > 100, str(fuzz.outcomes)
        assert server.stop() == 0
    finally:
        server.kill()
