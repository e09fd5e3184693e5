"""Completions: every form of prompt, echo, and logprobs in the older shape."""

from types import SimpleNamespace

import pytest

from octavo.request import Logprob
from octavo.sampling_params import SamplingParams
from octavo.server import stream
from octavo.server.completions import CompletionReply
from tests.server.serving import EOS, TOKENIZER, Server, events, run

TEXT = "Hi, wörld 🙂!"


def texts(reply: dict) -> list[str]:
    return [choice["text"] for choice in reply["choices"]]


def streamed(chunks: list[dict]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


@run
async def test_whole_and_streamed(server: Server):
    whole = (await server.complete(max_tokens=100)).json()
    assert whole["object"] == "text_completion"
    assert texts(whole) == [TEXT]
    assert whole["usage"]["prompt_tokens"] == 5
    chunks = events((await server.complete(max_tokens=100, stream=True)).text)
    assert streamed(chunks) == {0: TEXT}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@run
async def test_sixteen_tokens_are_the_default(server: Server):
    reply = (await server.complete()).json()
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


@run
async def test_every_form_of_prompt(server: Server):
    server.engine.script = lambda request, index: [*request.prompt_token_ids, EOS]  # says what it was asked
    ids = TOKENIZER.encode("ab")
    for prompt, said in (("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), (ids, ["ab"]), ([ids, ids[:1]], ["ab", "a"])):
        assert texts((await server.complete(prompt)).json()) == said
        chunks = events((await server.complete(prompt, stream=True)).text)
        assert list(dict(sorted(streamed(chunks).items())).values()) == said


@run
async def test_samples_of_several_prompts_are_numbered_through(server: Server):
    whole = (await server.complete(["a", "b"], n=2, max_tokens=99)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts(whole) == [TEXT, f"{TEXT} 1"] * 2
    chunks = events((await server.complete(["a", "b"], n=2, max_tokens=99, stream=True)).text)
    assert streamed(chunks) == dict(enumerate(texts(whole)))


@run
async def test_echo_with_logprobs(server: Server):
    fields = {"echo": True, "logprobs": 2, "max_tokens": 7}
    whole = (await server.complete("wör", **fields)).json()["choices"][0]
    assert whole["text"] == "wörHi, wö"
    shape = whole["logprobs"]
    assert shape["tokens"] == ["w", r"bytes:\xc3", r"bytes:\xb6", "r", *"Hi, w", r"bytes:\xc3", r"bytes:\xb6"]
    assert shape["text_offset"] == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert shape["token_logprobs"] == [None, *[-0.5] * 10]
    assert shape["top_logprobs"][0] is None
    assert len(shape["top_logprobs"][3]) == 2
    by_ids = (await server.complete(TOKENIZER.encode("wör"), **fields)).json()["choices"][0]
    assert by_ids == whole
    chunks = events((await server.complete("wör", stream=True, **fields)).text)
    assert streamed(chunks) == {0: whole["text"]}
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert {name: [x for part in parts for x in part[name]] for name in shape} == shape


@run
async def test_echo_of_the_prompt_alone(server: Server):
    """As evaluations ask for a text's log probabilities."""
    more = (await server.complete(["wör", "d"], echo=True, logprobs=2, max_tokens=1)).json()["choices"]
    reply = (await server.complete(["wör", "d"], echo=True, logprobs=2, max_tokens=0)).json()
    assert [choice["text"] for choice in reply["choices"]] == ["wör", "d"]
    for choice, longer in zip(reply["choices"], more, strict=True):
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] == {name: values[:-1] for name, values in longer["logprobs"].items()}
    assert reply["usage"]["completion_tokens"] == 0
    assert reply["usage"]["prompt_tokens"] == 5
    chunks = events(
        (
            await server.complete("wör", echo=True, max_tokens=0, stream=True, stream_options={"include_usage": True})
        ).text
    )
    assert streamed(chunks[:-1]) == {0: "wör"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 0
    assert (await server.complete("wör", max_tokens=0)).status_code == 400


def test_top_logprobs_of_one_text_do_not_collide():
    """Half an emoji is told by its bytes; and a token that is written as another is told by its number."""
    reply = CompletionReply.__new__(CompletionReply)
    text = {1: b"\xf0\x9f", 2: b"\x98", 3: b"a", 4: b"a", 5: b"a"}
    reply._model = SimpleNamespace(tokenizer=SimpleNamespace(token_bytes=text.__getitem__))
    reply._num_logprobs = 5
    entry = {token: Logprob(-float(token), token) for token in text}
    names = [r"bytes:\xf0\x9f", r"bytes:\x98", "a", "token_id:4", "token_id:5"]
    assert reply._top(3, entry) == dict(zip(names, [-1.0, -2.0, -3.0, -4.0, -5.0], strict=True))
    names = [*names[:2], "token_id:3", "token_id:4", "a"]
    assert list(reply._top(5, entry).items()) == list(zip(names, [-1.0, -2.0, -3.0, -4.0, -5.0], strict=True))
    reply._num_logprobs = 1
    assert reply._top(5, entry) == {names[0]: -1.0, "a": -5.0}


@run
async def test_prompt_logprobs_of_each_choice(server: Server):
    reply = (await server.complete(["abc", "d"], prompt_logprobs=0)).json()
    assert [len(choice["prompt_logprobs"]) for choice in reply["choices"]] == [3, 1]


@run
async def test_many_logprobs_are_told_as_few_are(server: Server):
    fields = {"n": 2, "echo": True, "logprobs": 3, "prompt_logprobs": 2, "max_tokens": 7}
    few = (await server.complete(["wör", "d"], **fields)).json()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_MANY_LOGPROBS", 0)
        many = (await server.complete(["wör", "d"], **fields)).json()
    assert many["choices"] == few["choices"]
    assert many["usage"] == few["usage"]


@run
async def test_bad_words_and_bias_reach_the_engine(server: Server):
    seen = []
    script = server.engine.script
    server.engine.script = lambda request, index: seen.append(request) or script(request, index)
    await server.complete(bad_words=["no"], logit_bias={"5": -100}, priority=3, cache_salt="mine", top_k=-1)
    (request,) = seen
    assert TOKENIZER.encode("no") in request.bad_words_token_ids
    assert request.params.logit_bias == {5: -100.0}
    assert (request.priority, request.cache_salt, request.params.top_k) == (3, "mine", 0)


@run
async def test_beams_come_at_the_end_with_their_scores(server: Server):
    fields = {"use_beam_search": True, "best_of": 4, "n": 2, "length_penalty": 0.5, "early_stopping": "never"}
    seen: list[SamplingParams] = []
    script = server.engine.script
    server.engine.script = lambda request, index: (seen.append(request.params), script(request, index))[1]
    whole = (await server.complete(max_tokens=99, **fields)).json()
    params = seen[0]
    assert (params.beam_width, params.n, params.temperature) == (4, 2, 0.0)
    assert (params.length_penalty, params.early_stopping) == (0.5, "never")
    assert texts(whole) == [TEXT, f"{TEXT} 1"]
    scores = [(choice["cumulative_logprob"], choice["beam_score"]) for choice in whole["choices"]]
    assert scores == [(-2.0, -1.0), (-3.0, -2.0)]
    chunks = events((await server.complete(max_tokens=99, stream=True, **fields)).text)
    assert streamed(chunks) == dict(enumerate(texts(whole)))
    told = {choice["index"]: choice["beam_score"] for chunk in chunks for choice in chunk["choices"]}
    assert told == {0: -1.0, 1: -2.0}
    chat = (await server.chat(use_beam_search=True, n=2)).json()
    assert [choice["beam_score"] for choice in chat["choices"]] == [-1.0, -2.0]
    assert "beam_score" not in (await server.complete()).json()["choices"][0]


@run
async def test_what_beams_do_not_go_with(server: Server):
    for fields, param in (
        ({"use_beam_search": True}, "best_of"),
        ({"use_beam_search": True, "best_of": 33}, "best_of"),
        ({"use_beam_search": True, "best_of": 2, "n": 3}, "n"),
        ({"use_beam_search": True, "best_of": 2, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "best_of": 2, "stop": "x"}, "stop"),
        ({"best_of": 2}, "best_of"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"use_beam_search": True, "best_of": 2, "early_stopping": 3}, "early_stopping"),
    ):
        reply = await server.complete(**fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), fields
