"""The interface of 3.x and 4.x: `VllmEngine` in this process and in another, and clients over HTTP."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from octavo.errors import ConfigError, OctavoError, RequestError
from octavo.swift import (
    InferClient,
    InferRequest,
    InferStats,
    PtEngine,
    RequestConfig,
    VllmEngine,
    XRequestConfig,
    get_model_list_client,
    history_to_messages,
    inference_client,
    inference_client_async,
    inference_vllm,
    messages_to_history,
)
from octavo.swift.client import ServerError
from octavo.swift.generation_config import VllmGenerationConfig

HI = InferRequest([{"role": "user", "content": "Who are you?"}])
CHAT = InferRequest(history_to_messages([["A", "B"], ["Where?", None]], "Brief."))
GREEDY = RequestConfig(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def vllm_engine(modelscope_cache) -> Iterator[VllmEngine]:
    made = VllmEngine(str(modelscope_cache / "qwen/Qwen-7B-Chat"), kv_cache_memory="32MiB")
    yield made
    made.shutdown()


def test_answers_are_those_of_the_older_functions(vllm_engine, engine, template):
    stats = InferStats()
    found = vllm_engine.infer([HI, CHAT], GREEDY, [stats])
    requests = [{"query": "Who are you?"}, {"query": "Where?", "history": [["A", "B"]], "system": "Brief."}]
    # The file's repetition penalty holds in both.
    config = VllmGenerationConfig(max_tokens=12, temperature=0, repetition_penalty=1.1, top_p=0.8)
    old = inference_vllm(engine, template, requests, generation_config=config)
    assert [r.choices[0].message.content for r in found] == [r["response"] for r in old]
    assert found[0].choices[0].message.role == "assistant"
    assert found[0].usage.total_tokens == found[0].usage.prompt_tokens + found[0].usage.completion_tokens
    counts = stats.compute()
    assert list(counts) == [
        *("num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s")
    ]
    assert counts["num_samples"] == 2
    assert counts["num_generated_tokens"] == sum(response.usage.completion_tokens for response in found)


def test_a_stream_joined_is_the_whole(vllm_engine):
    whole = vllm_engine.infer([HI, CHAT], GREEDY)
    stats = InferStats()
    streams = vllm_engine.infer([HI, CHAT], RequestConfig(max_tokens=12, temperature=0, stream=True), [stats])
    for stream, response in zip(reversed(streams), reversed(whole), strict=True):
        pieces = list(stream)
        assert "".join(piece.choices[0].delta.content for piece in pieces) == response.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == response.choices[0].finish_reason
        assert pieces[-1].usage == response.usage
        assert len({piece.id for piece in pieces}) == 1
    assert stats.compute()["num_samples"] == 2


def test_details(vllm_engine):
    config = RequestConfig(max_tokens=5, n=2, seed=1, logprobs=True, top_logprobs=2, return_details=True)
    (response,) = vllm_engine.infer([HI], config)
    assert response.usage.prompt_tokens == len(response.prompt_token_ids)
    for choice in response.choices:
        assert len(choice.logprobs["content"]) == len(choice.token_ids) <= 5
        assert len(choice.logprobs["content"][0]["top_logprobs"]) == 2
    assert sum(len(choice.token_ids) for choice in response.choices) == response.usage.completion_tokens


def test_a_reference_answer_is_left_out(vllm_engine):
    with_answer = {"messages": [*HI.messages, {"role": "assistant", "content": "reference"}]}
    first, second = vllm_engine.infer([HI, with_answer], GREEDY)
    assert first.choices == second.choices


def test_beams(vllm_engine):
    two = RequestConfig(num_beams=3, n=2, max_tokens=6, length_penalty=0.5)
    (found,) = vllm_engine.infer([HI], two)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found == replace(vllm_engine.infer([HI], two)[0], id=found.id, created=found.created)
    with pytest.raises(RequestError, match="temperature"):
        vllm_engine.infer([HI], RequestConfig(num_beams=3, temperature=0.5))


def test_mistakes(modelscope_cache, vllm_engine):
    for config in (RequestConfig(best_of=2), RequestConfig(structured_outputs_regex="a+")):
        with pytest.raises(ConfigError, match="is not supported yet"):
            vllm_engine.infer([HI], config)
    with pytest.raises(ConfigError, match=r"length_penalty is 0\.5, which needs num_beams above 1"):
        vllm_engine.infer([HI], RequestConfig(length_penalty=0.5))
    with pytest.raises(ConfigError, match="takes text only"):
        InferRequest(HI.messages, images=["a.png"])
    with pytest.raises(RequestError, match=r"messages\[1\].role is 'user'"):
        vllm_engine.infer([InferRequest([*HI.messages, *HI.messages])])
    with pytest.raises(ConfigError, match="use_async_engine=True"):
        asyncio.run(vllm_engine.infer_async(HI))
    for options in ({"adapters": ["a"]}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with pytest.raises(ConfigError, match="support"):
            VllmEngine(str(modelscope_cache / "qwen/Qwen-7B-Chat"), **options)
    assert PtEngine is VllmEngine
    assert not vllm_engine.llm.engine.has_work()


def test_mistakes_show_before_a_model_is_looked_for():
    wrong = [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"template_type": "qwen25"},
        {"max_num_seq": 1},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            VllmEngine("nobody/has-this", **options)


def test_many_at_once_in_another_process(modelscope_cache, vllm_engine):
    made = VllmEngine(str(modelscope_cache / "qwen/Qwen-7B-Chat"), kv_cache_memory="32MiB", use_async_engine=True)

    async def ask():
        try:
            whole = await asyncio.gather(*(made.infer_async(request, GREEDY) for request in (HI, CHAT)))
            stream = await made.infer_async(HI, RequestConfig(max_tokens=12, temperature=0, stream=True))
            return whole, [piece async for piece in stream]
        finally:
            await made.close()

    whole, pieces = asyncio.run(ask())
    expected = vllm_engine.infer([HI, CHAT], GREEDY)
    assert [response.choices for response in whole] == [response.choices for response in expected]
    assert "".join(piece.choices[0].delta.content for piece in pieces) == expected[0].choices[0].message.content
    with pytest.raises(ConfigError, match="use_async_engine=False"):
        made.infer([HI])


def test_messages_and_history():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "assistant", "content": "B"},
        {"role": "tool", "content": "C"},
    ]
    parts = messages_to_history(messages)
    assert parts["system"] == "S"
    assert parts["history"] == [["A", "B"]]
    assert (parts["query"], parts["query_role"], parts["response"]) == ("C", "tool", None)
    assert history_to_messages([["A", "B"], ["C", None]], "S", [["user", "assistant"], ["tool", "assistant"]]) == [
        *(messages[0], {"role": "user", "content": "A"}, *messages[2:])
    ]
    for wrong in ([], messages[:1], [messages[2]], [{"role": "user", "content": 3}]):
        with pytest.raises(RequestError):
            messages_to_history(wrong)


# ---- clients --------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A server that answers with the last words that it was asked, and refuses "bad"."""

    asked: list[dict] = []  # noqa: RUF012

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "max_model_len": 8}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append({**body, "key": self.headers["authorization"]})
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if text == "bad":
            return self.reply(400, {"message": "it is bad", "object": "error"})
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        common = {"id": f"id-{text}", "created": 1, "model": body["model"], "usage": usage, "object": "chat.completion"}
        if "prompt" in body:
            return self.reply(200, {**common, "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            return self.reply(200, {**common, "choices": [choice]})
        self.send_response(200)
        self.end_headers()
        for letter in text:
            chunk = {**common, "choices": [{"index": 0, "delta": {"content": letter}, "finish_reason": None}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if text == "torn":
            self.wfile.write(b'data: {"error": {"message": "the engine died"}}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(text: str) -> InferRequest:
    return InferRequest([{"role": "user", "content": text}])


def test_client(port):
    client = InferClient(port=port, api_key="secret")
    assert client.models == ["m"]
    stats = InferStats()
    found = client.infer([ask(str(i)) for i in range(5)], RequestConfig(temperature=0, max_tokens=3), [stats])
    assert [response.choices[0].message.content for response in found] == ["0", "1", "2", "3", "4"]
    assert stats.compute()["num_generated_tokens"] == 10
    last = Handler.asked[-1]
    assert (last["model"], last["temperature"], last["max_tokens"]) == ("m", 0, 3)
    assert last["key"] == "Bearer secret"
    assert "num_beams" not in last
    (stream,) = client.infer([ask("héllo")], RequestConfig(stream=True))
    assert "".join(piece.choices[0].delta.content for piece in stream) == "héllo"
    assert asyncio.run(client.infer_async(ask("x"))).choices[0].message.content == "x"


def test_functions_of_2x(port):
    assert get_model_list_client(port=port).data[0].id == "m"
    response = inference_client("m", "three", [["one", "two"]], "S", port=port)
    assert response.choices[0].message.content == "three"
    roles = [message["role"] for message in Handler.asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert inference_client("m", "raw", is_chat_request=False, port=port).choices[0].text == "raw"

    async def stream():
        pieces = await inference_client_async("m", "abc", port=port, request_config=XRequestConfig(stream=True))
        return [piece.choices[0].delta.content async for piece in pieces]

    assert asyncio.run(stream()) == ["a", "b", "c"]


def test_a_server_s_errors_are_told(port):
    client = InferClient(port=port)
    with pytest.raises(ServerError, match=r"refused \(HTTP 400\): it is bad") as error:
        client.infer([ask("bad")])
    assert error.value.status == 400
    (stream,) = client.infer([ask("torn")], RequestConfig(stream=True))
    with pytest.raises(ServerError, match="the engine died"):
        list(stream)
    with pytest.raises(OctavoError, match="no server answers at"):
        InferClient(port=1).infer([ask("x")])
    with pytest.raises(ConfigError, match="it must be like"):
        InferClient(base_url="localhost:8000")
    with pytest.raises(ConfigError, match="images is given"):
        inference_client("m", "x", images=["a.png"], port=port)
