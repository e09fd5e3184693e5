"""Completions: every form of prompt, echo, and logprobs in the older shape."""

import pytest

from octavo.sampling_params import SamplingParams
from octavo.server import stream
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
    assert shape["tokens"] == ["w", "�", "�", "r", *"Hi, w", "�", "�"]
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
