"""/openapi.json is valid, and what comes back is what it says."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

from octavo.config import ServerOptions
from octavo.server.dialect import Dialect
from octavo.swift.dialect import SwiftDialect
from tests.server.serving import Server, events, run, serving

CHATS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 3},
    {"prompt_logprobs": 2},
    {"use_beam_search": True, "n": 2},
    {"stop": "wör"},
    {"temprature": 1},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": 3, "echo": True},
    {"prompt_logprobs": 2},
    {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 1},
    {"use_beam_search": True, "n": 2},
    {"max_tokens": -1},
]


class Document:
    def __init__(self, document: dict[str, Any]):
        self.document = document

    @classmethod
    async def of(cls, server: Server) -> "Document":
        document = (await server.get("/openapi.json")).json()
        validate(document)
        return cls(document)

    def check(self, value: Any, method: str, path: str, status: int, kind: str = "application/json") -> None:
        responses = self.document["paths"][path][method]["responses"]
        schema = responses.get(str(status), responses.get("default"))["content"][kind]["schema"]
        jsonschema.validate(value, {**schema, "components": self.document["components"]})


@pytest.mark.parametrize("dialect", [Dialect(), SwiftDialect()], ids=["openai", "swift"])
def test_what_comes_back_is_what_the_document_says(dialect: Dialect):
    async def whole() -> None:
        async with serving(dialect=dialect) as server:
            document = await Document.of(server)
            for path, name in (("/v1/models", ""), ("/v1/models/{name}", "tiny"), ("/health", ""), ("/ready", "")):
                answer = await server.get(path.replace("{name}", name))
                document.check(answer.json(), "get", path, answer.status_code)
            answer = await server.get("/v1/models/none")
            document.check(answer.json(), "get", "/v1/models/{name}", answer.status_code)
            for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]}), ("/tokenize", {})):
                answer = await server.post(path, body)
                document.check(answer.json(), "post", path, answer.status_code)
            chat, messages = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
            for path, bodies in ((chat, CHATS), ("/v1/completions", COMPLETIONS)):
                first = {"messages": messages} if path == chat else {"prompt": "hello"}
                for body in bodies:
                    answer = await server.post(path, first | body)
                    document.check(answer.json(), "post", path, answer.status_code)
                    for options in (None, {"include_usage": True, "continuous_usage_stats": True}):
                        more = {"stream": True} | ({"stream_options": options} if options else {})
                        streamed = await server.post(path, first | body | more)
                        if streamed.status_code != 200:
                            continue
                        for event in events(streamed.text):
                            document.check(event, "post", path, 200, "text/event-stream")

    asyncio.run(whole())


@run
async def test_what_goes_in(server: Server):
    document = await Document.of(server)

    def taken(path: str, body: dict[str, Any]) -> bool:
        schema = document.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        try:
            jsonschema.validate(body, {**schema, "components": document.document["components"]})
        except jsonschema.ValidationError:
            return False
        return True

    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}], "annotations": []}]
    for body, good in (
        ({"messages": messages}, True),
        ({"messages": messages, "temperature": 1, "n": 2.0, "metadata": {"a": 1}, "tools": [], "seed": None}, True),
        ({"messages": messages, "temprature": 1}, False),
        ({"messages": messages, "tools": [{"type": "function"}]}, False),
        ({"messages": messages, "n": "2"}, False),
        ({"messages": "hi"}, False),
        ({}, False),
    ):
        assert taken("/v1/chat/completions", body) == good, body
        assert ((await server.post("/v1/chat/completions", body)).status_code == 200) == good, body


def test_the_key_is_in_the_document():
    async def whole() -> None:
        async with serving(options=ServerOptions(api_key="secret")) as server:
            headers = {"Authorization": "Bearer secret"}
            document = (await server.get("/openapi.json", headers=headers)).json()
            validate(document)
            assert document["security"] == [{"key": []}]
            assert "secret" not in json.dumps(document)

    asyncio.run(whole())
