"""`octavo deploy` on the wire: what its routes do otherwise than `octavo serve`'s."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from octavo.config import ServerOptions
from octavo.server.model import ServedModel
from octavo.swift.dialect import SwiftDialect
from tests.server.serving import TOKENIZER, Server, events, serving


class BaseModel(ServedModel):
    """A model that only continues texts."""

    is_chat = False


def deployed(test: Callable[[Server], Coroutine[Any, Any, None]], chat: bool = True, **options: Any) -> None:
    async def whole() -> None:
        model = (ServedModel if chat else BaseModel)("qwen-7b-chat", TOKENIZER)
        settings = {"dialect": SwiftDialect("me"), "model": model, "options": ServerOptions(**options)}
        async with asyncio.timeout(20), serving(**settings) as server:
            await test(server)

    asyncio.run(whole())


def test_errors_have_ms_swift_s_shape():
    async def test(server: Server) -> None:
        replies = [
            await server.chat(temperature=-1),
            await server.chat(model="qwen-7b"),
            await server.chat(nonsense=1),
            await server.post("/v1/chat/completions", []),
        ]
        for reply in replies:
            assert reply.status_code == 400
            assert list(reply.json()) == ["message", "object"]
            assert reply.json()["object"] == "error"
        assert "qwen-7b-chat" in replies[1].json()["message"]
        lost = await server.get("/nowhere")
        assert (lost.status_code, lost.json()["object"]) == (404, "error")

    deployed(test)


def test_a_wrong_key_is_a_bad_request():
    async def test(server: Server) -> None:
        reply = await server.chat()
        assert (reply.status_code, reply.json()["object"]) == (400, "error")
        assert (await server.chat(headers={"Authorization": "Bearer secret"})).status_code == 200

    deployed(test, api_key="secret")


def test_an_error_in_a_stream():
    async def test(server: Server) -> None:
        server.engine._schedule = lambda: server.engine._step() if not server.engine.steps else None
        asked = asyncio.create_task(server.chat(stream=True))
        while not server.engine.steps:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        server.engine.die("no luck")
        last = (await asked).text.rstrip().split("\n\n")[-1]
        assert last.startswith('data: {"message":')
        assert last.endswith('"object":"error"}')

    deployed(test)


def test_cards():
    async def test(server: Server) -> None:
        (card,) = (await server.get("/v1/models")).json()["data"]
        assert list(card) == ["id", "is_chat", "is_multimodal", "object", "created", "owned_by"]
        assert (card["id"], card["is_chat"], card["is_multimodal"]) == ("qwen-7b-chat", True, False)
        assert (card["object"], card["owned_by"]) == ("model", "me")

    deployed(test)


def test_each_route_is_for_its_kind_of_model():
    async def chat(server: Server) -> None:
        assert (await server.chat()).status_code == 200
        reply = await server.complete()
        assert (reply.status_code, reply.json()["message"]) == (
            400,
            "qwen-7b-chat answers chats; use /v1/chat/completions",
        )

    async def base(server: Server) -> None:
        assert (await server.complete()).status_code == 200
        reply = await server.chat()
        assert reply.status_code == 400
        assert "use /v1/completions" in reply.json()["message"]
        assert (await server.get("/v1/models")).json()["data"][0]["is_chat"] is False

    deployed(chat)
    deployed(base, chat=False)


def test_lengths_are_cut_to_the_context(caplog):
    async def chat(server: Server) -> None:
        server.engine.script = lambda request, index: [65] * 600
        whole = (await server.chat()).json()
        assert whole["usage"]["total_tokens"] == 512
        assert not caplog.records
        cut = (await server.chat(max_tokens=100_000)).json()
        assert cut["usage"] == whole["usage"]
        assert "max_tokens 100000 is cut to" in caplog.messages[0]

    async def base(server: Server) -> None:
        server.engine.script = lambda request, index: [65] * 600
        assert (await server.complete("hello")).json()["usage"]["total_tokens"] == 512

    deployed(chat)
    deployed(base, chat=False)


def test_every_chunk_has_usage_and_role():
    async def chat(server: Server) -> None:
        chunks = events((await server.chat(stream=True)).text)
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert {chunk["id"][:9] for chunk in chunks} == {"chatcmpl-"}
        assert {chunk["choices"][0]["delta"]["role"] for chunk in chunks} == {"assistant"}
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Hi, wörld 🙂!"
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        whole = (await server.chat()).json()["usage"]
        assert chunks[-1]["usage"] == whole

    async def base(server: Server) -> None:
        chunks = events((await server.complete(stream=True)).text)
        assert {chunk["object"] for chunk in chunks} == {"text_completion.chunk"}
        assert {chunk["id"][:5] for chunk in chunks} == {"cmpl-"}
        assert all(chunk["usage"]["prompt_tokens"] == 5 for chunk in chunks)

    deployed(chat)
    deployed(base, chat=False)


def test_clients_of_ms_swift_may_ask_for_beams():
    async def test(server: Server) -> None:
        server.engine.script = lambda request, index: [*TOKENIZER.encode(f"beam {request.params.beam_width}"), 257]
        found = (await server.chat(num_beams=3, n=2, images=[], audios=None)).json()
        assert [choice["message"]["content"] for choice in found["choices"]] == ["beam 3", "beam 3"]
        for beams in (1, None):
            assert (await server.chat(num_beams=beams)).json()["choices"][0]["message"]["content"] == "beam 0"
        for odd in (0, -1, "2", 2.5, True, [2]):
            reply = await server.chat(num_beams=odd)
            assert reply.status_code == 400
            assert reply.json()["message"].startswith("num_beams is ")
        assert "unknown field 'images'" in (await server.chat(images=["a.png"])).json()["message"]

    deployed(test)


def test_logprobs_have_one_shape_on_both_routes():
    async def chat(server: Server) -> None:
        reply = (await server.chat(logprobs=True, top_logprobs=2, max_tokens=1)).json()
        (token,) = reply["choices"][0]["logprobs"].pop("content")
        assert reply["choices"][0]["logprobs"] == {}
        assert list(token) == ["token", "logprob", "bytes", "top_logprobs"]

    async def base(server: Server) -> None:
        server.engine.script = lambda request, index: [*TOKENIZER.encode("é")]
        reply = (await server.complete(logprobs=2, max_tokens=2)).json()
        first, second = reply["choices"][0]["logprobs"]["content"]
        assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
        assert len(first["top_logprobs"]) == 2
        streamed = events((await server.complete(logprobs=2, max_tokens=2, stream=True)).text)
        pieces = [piece["choices"][0]["logprobs"] for piece in streamed]
        assert [token for piece in pieces if piece for token in piece["content"]] == [first, second]

    deployed(chat)
    deployed(base, chat=False)


def test_a_repetition_is_an_end_like_others():
    choice = {"index": 0, "finish_reason": "repetition", "text": ""}
    assert SwiftDialect().choice(choice)["finish_reason"] == "stop"
