"""Every error as a client meets it: the status, OpenAI's shape, and the field at fault."""

import asyncio

import pytest

from octavo.config import ServerOptions
from tests.server.serving import Server, run, serving

JSON = {"Content-Type": "application/json"}


def error_of(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


CHAT_MISTAKES = [
    ({"temprature": 0.5}, "temprature", "unknown field 'temprature'. Did you mean 'temperature'?"),
    ({"temperature": "hot"}, "temperature", "temperature is 'hot'; it must be a valid number"),
    ({"temperature": -1}, "temperature", "it must be from 0 to 2"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'; it must be a valid integer"),
    ({"max_tokens": True}, "max_tokens", "it must be a valid integer"),
    ({"stop": [1]}, "stop", "it must be a string or a list of strings"),
    ({"stop": ""}, "stop", "empty string"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported yet"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported yet"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs", "not supported yet"),
    ({"temperature": 2.5}, "temperature", "temperature is 2.5; it must be from 0 to 2"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias of token '5' is 101.0; it must be from -100 to 100"),
    ({"cache_salt": ""}, "cache_salt", "cache_salt is empty"),
    ({"max_tokens": 4.5}, "max_tokens", "it must be a valid integer"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools", "tools is not supported yet"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "missing"),
    ({"continue_final_message": True}, "continue_final_message", "not supported yet"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"includ_usage": True}}, "stream_options.includ_usage", "include_usage"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "whole answers"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        "needs include_usage",
    ),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages.0.role", "Did you mean 'user'?"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a string or a list of text parts"),
    ({"messages": [{"role": "user", "contents": "a"}]}, "messages.0.contents", "Did you mean 'content'?"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
        "only text",
    ),
    ({"chat_template_kwargs": {"template": "x"}}, "chat_template_kwargs.template", "cannot be set"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "outside the vocabulary of 258"),
    ({"n": 65}, "n", "at most 64"),
    ({"use_beam_search": True, "n": 2, "logit_bias": {str(i): 1 for i in range(258)}}, "logit_bias", "does not use"),
]


@pytest.mark.parametrize(("fields", "param", "message"), CHAT_MISTAKES, ids=[str(m[1]) for m in CHAT_MISTAKES])
def test_mistakes_name_the_field(fields: dict, param: str, message: str):
    @run
    async def ask(server: Server):
        error = error_of(await server.chat(**fields), 400)
        assert error["param"] == param
        assert message in error["message"]
        assert len(error["message"]) < 300
        assert error["type"] == "invalid_request_error"

    ask()


@run
async def test_completion_mistakes(server: Server):
    assert error_of(await server.complete(5), 400)["param"] == "prompt"
    assert "list of token ids" in error_of(await server.complete([1, "a"]), 400)["message"]
    assert error_of(await server.complete([]), 400)["param"] == "prompt"
    assert error_of(await server.complete([[]]), 400)["param"] == "prompt"
    assert error_of(await server.complete([7, 9999]), 400)["param"] == "prompt"
    assert error_of(await server.complete(suffix="x"), 400)["param"] == "suffix"
    assert error_of(await server.post("/v1/completions", {}), 400)["message"] == "prompt is missing"


@run
async def test_a_message_is_one_line(server: Server):
    for path in ("/v1/models/a%00b%0ac%ff", "/%e2%80%a8", "/" + "%f0%9f%99%82" * 99):
        message = error_of(await server.post(path, {}), 404)["message"]
        assert message.isprintable()
        assert len(message) < 300


@run
async def test_more_logprobs_than_an_answer_may_hold(server: Server):
    answer = await server.complete([5] * 400, n=25, prompt_logprobs=100)
    assert "25 makes an answer of 1010000 entries" in error_of(answer, 400)["message"]
    answer = await server.complete([[5] * 400] * 25, echo=True, logprobs=100)
    assert error_of(answer, 400)["param"] == "prompt_logprobs"


@run
async def test_bodies_that_are_no_request(server: Server):
    for body in (b"", b"{", b"\xff{}", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'):
        answer = await server.client.post("/v1/chat/completions", content=body, headers=JSON)
        assert "not valid JSON" in error_of(answer, 400)["message"]
    answer = await server.client.post("/v1/chat/completions", content=b"[]", headers=JSON)
    assert error_of(answer, 400)["message"] == "the body must be a JSON object"


@run
async def test_a_prompt_that_is_too_long_is_told_with_both_numbers(server: Server):
    error = error_of(await server.chat("x" * 600), 400)
    assert error["param"] == "messages"
    assert "618 tokens" in error["message"]
    assert "512" in error["message"]
    error = error_of(await server.complete("x" * 500, max_tokens=50), 400)
    assert error["param"] == "max_tokens"
    assert "set max_tokens to 12 or less" in error["message"]


@run
async def test_unknown_model_route_and_method(server: Server):
    error = error_of(await server.chat(model="tinny"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "Did you mean 'tiny'?" in error["message"]
    assert error_of(await server.get("/v1/models/other"), 404)["code"] == "model_not_found"
    error = error_of(await server.get("/v1/chat/completion"), 404)
    assert "Did you mean '/v1/chat/completions'?" in error["message"]
    answer = await server.get("/v1/chat/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_full_queue():
    async def ask():
        async with serving(options=ServerOptions(max_queued_requests=1)) as server:
            server.engine.held = True
            first = asyncio.create_task(server.chat())
            await asyncio.sleep(0.05)
            answer = await server.chat()
            error = error_of(answer, 429)
            assert answer.headers["retry-after"] == "1"
            assert "--max-queued-requests" in error["message"]
            error = error_of(await server.complete(["a", "b"]), 400)
            assert error["param"] == "prompt"
            server.engine.release()
            assert (await first).status_code == 200

    asyncio.run(ask())


def test_prompts_that_do_not_all_fit_leave_none_behind():
    async def ask():
        async with serving(options=ServerOptions(max_queued_requests=2)) as server:
            server.engine.held = True
            first = asyncio.create_task(server.chat())
            await asyncio.sleep(0.05)
            error_of(await server.complete(["a", "b"]), 429)
            assert server.engine.num_open == 1
            server.engine.release()
            await first

    asyncio.run(ask())


def test_a_body_that_is_too_large():
    async def ask():
        async with serving(options=ServerOptions(max_body_bytes=1000)) as server:
            answer = await server.chat("x" * 2000)
            assert "1000 bytes" in error_of(answer, 413)["message"]
            assert answer.headers["connection"] == "close"
            sent = 0

            async def pieces():
                nonlocal sent
                for _ in range(100):
                    sent += 100
                    yield b" " * 100

            error_of(await server.client.post("/v1/completions", content=pieces(), headers=JSON), 413)
            assert sent <= 1200, "the body was read beyond the limit"

    asyncio.run(ask())


def test_the_key():
    async def ask():
        async with serving(options=ServerOptions(api_key="sésame")) as server:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sésame".encode()}):
                for path in ("/v1/models", "/tokenize", "/openapi.json", "/nowhere"):
                    answer = await server.get(path, headers=headers)
                    assert error_of(answer, 401)["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
            right = {"authorization": "Bearer sésame".encode()}
            assert (await server.get("/v1/models", headers=right)).status_code == 200
            for path in ("/health", "/ready", "/metrics", "/version"):
                assert (await server.get(path)).status_code == 200

    asyncio.run(ask())


@run
async def test_a_dead_engine(server: Server):
    server.engine.held = True
    streams = [asyncio.create_task(server.chat(stream=stream)) for stream in (False, True)]
    await asyncio.sleep(0.05)
    server.engine.die("killed by SIGKILL")
    for answer in await asyncio.gather(*streams):
        error = error_of(answer, 503)  # nothing was sent yet, so even the stream has its status
        assert error["message"] == "the engine stopped: killed by SIGKILL"
        assert "retry-after" in answer.headers
    error_of(await server.chat(), 503)
    health = await server.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "unhealthy", "reason": "the engine stopped: killed by SIGKILL"}
    assert (await server.get("/ready")).status_code == 503


@run
async def test_an_error_in_the_middle_of_a_stream(server: Server):
    def script(request, index):
        asyncio.get_running_loop().call_later(0.02, lambda: server.engine.die("out of luck"))
        return [65] * 400

    server.engine.script = script
    server.engine._schedule = lambda: asyncio.get_running_loop().call_later(0.005, server.engine._step)
    answer = await server.chat(stream=True)
    assert answer.status_code == 200
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert last.startswith('data: {"error": {"message": "the engine stopped: out of luck"')
    assert "[DONE]" not in answer.text


@run
async def test_unexpected_errors_tell_nothing(server: Server):
    def broken(*arguments, **settings):
        raise KeyError("the secret of another request")

    server.engine.submit = broken
    for stream in (False, True):
        error = error_of(await server.chat(stream=stream), 500)
        assert error["code"] == "internal_error"
        assert "secret" not in str(error)


@run
async def test_loading_and_draining_servers_take_nothing(server: Server):
    for state, reason in (("loading", "the model is loading"), ("draining", "the server is shutting down")):
        setattr(server.service, state, True)
        answer = await server.chat()
        assert reason in error_of(answer, 503)["message"]
        assert "retry-after" in answer.headers
        ready = await server.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, reason)
        assert (await server.get("/health")).status_code == 200
        setattr(server.service, state, False)
    assert (await server.get("/ready")).status_code == 200
