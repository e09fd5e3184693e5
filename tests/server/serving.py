"""A server in the test's own event loop: an engine that answers at once, and a client without sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx

from octavo.config import ServerOptions
from octavo.request import Request
from octavo.server.access import Keys
from octavo.server.app import build_app
from octavo.server.dialect import Dialect
from octavo.server.metrics import Metrics
from octavo.server.model import ServedModel
from octavo.server.service import Service
from tests.server.double import EngineDouble, byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_ids[0]


def says(text: str) -> Callable[[Request, int], list[int]]:
    """A script whose every sample is `text` and its own number after it, but for the first."""
    return lambda request, index: [*TOKENIZER.encode(text + (f" {index}" if index else "")), EOS]


def events(body: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class Server:
    """What a test sees: `post` and `get` on the application, and the parts behind it."""

    def __init__(self, engine: EngineDouble, service: Service, client: httpx.AsyncClient):
        self.engine = engine
        self.service = service
        self.client = client

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.client.get(path, **more)

    async def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **more)

    async def chat(
        self, content: str = "hello", headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", {"messages": messages, **fields}, headers=headers)

    async def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": prompt, **fields})


@asynccontextmanager
async def serving(
    text: str = "Hi, wörld 🙂!", options: ServerOptions | None = None, **settings: Any
) -> AsyncIterator[Server]:
    options = options or ServerOptions()
    script = settings.pop("script", says(text))
    dialect = settings.pop("dialect", Dialect())
    model = settings.pop("model", None) or ServedModel("tiny", TOKENIZER)
    engine = EngineDouble(script, EOS, max_queued_requests=options.max_queued_requests, **settings)
    await engine.start()
    service = Service(engine, options, Metrics(lambda: engine.stats), model, dialect, keys=Keys.of(options))
    transport = httpx.ASGITransport(build_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield Server(engine, service, client)
    assert engine.num_open == 0, "a request was left open"


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is a coroutine over a `Server` of its own."""

    def wrapped() -> None:
        async def whole() -> None:
            async with asyncio.timeout(20), serving() as server:
                await test(server)

        asyncio.run(whole())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped
