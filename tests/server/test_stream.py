"""What a stream sends beside its pieces, and what browsers and proxies need."""

import asyncio

import pytest

from octavo.config import ServerOptions
from octavo.server import stream
from tests.server.serving import Server, events, run, serving


def waiting(test):
    """A test over a server whose engine is held back and whose streams soon break a silence."""

    def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream, "SILENCE_SECONDS", 0.05)

        async def whole() -> None:
            async with asyncio.timeout(20), serving() as server:
                server.engine.held = True
                await test(server)

        asyncio.run(whole())

    wrapped.__name__ = test.__name__
    return wrapped


@waiting
async def test_a_queued_stream_is_kept_alive(server: Server):
    asked = asyncio.create_task(server.chat(stream=True))
    await asyncio.sleep(0.4)
    server.engine.release()
    reply = await asked
    assert reply.status_code == 200
    comments = reply.text.count(": keep-alive\n\n")
    assert 1 <= comments <= 8
    assert reply.text.startswith(": keep-alive\n\n")
    chunks = events(reply.text.replace(": keep-alive\n\n", ""))
    assert "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]) == "Hi, wörld 🙂!"


@waiting
async def test_an_error_after_a_comment_is_an_event(server: Server):
    asked = asyncio.create_task(server.chat(stream=True))
    await asyncio.sleep(0.1)
    server.engine.die("no luck")
    reply = await asked
    assert reply.status_code == 200
    assert '"type": "server_error"' in reply.text
    assert "[DONE]" not in reply.text


@run
async def test_a_quick_stream_has_no_comments(server: Server):
    assert "keep-alive" not in (await server.chat(stream=True)).text


def test_pages_of_allowed_origins_may_read():
    async def whole() -> None:
        options = ServerOptions(allowed_origins=["https://page.example"], api_key="secret")
        async with asyncio.timeout(20), serving(options=options) as server:
            asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
            asks["Access-Control-Request-Headers"] = "authorization,content-type"
            preflight = await server.client.options("/v1/chat/completions", headers=asks)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == "https://page.example"
            assert "authorization" in preflight.headers["access-control-allow-headers"]
            refused = await server.chat(headers={"Origin": "https://page.example"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://page.example"
            other = await server.get("/health", headers={"Origin": "https://other.example"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(whole())


@run
async def test_no_origin_may_read_by_default(server: Server):
    reply = await server.get("/health", headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in reply.headers


@run
async def test_ping_is_health(server: Server):
    assert (await server.get("/ping")).json() == {"status": "ok"}
    server.engine.failure = "stuck"
    assert (await server.get("/ping")).status_code == 503
