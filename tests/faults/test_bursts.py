"""Bursts while the engine stands still: nothing is lost, and whoever waits is answered or told to try again."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.served import Answer, Served, request_bytes, save_tiny_model

pytestmark = pytest.mark.faults

CONTEXT = 9000
OPTIONS = ("--max-num-seqs", "64", "--kv-cache-memory", "96MiB", "--confirm-timeout", "4", "--stall-timeout", "5")
SMALL = {"prompt": "Hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("model")
    made = Served(save_tiny_model(folder, CONTEXT), folder / "log", *OPTIONS)
    try:
        yield made
        assert made.stop() == 0
        assert "Traceback" not in made.log.read_text()
    finally:
        made.kill()


def run(test: Callable[[Served], Awaitable[None]]) -> Callable[[Served], None]:
    """A test that is a coroutine, after which the same engine must have nothing left and answer."""

    def wrapped(server: Served) -> None:
        async def whole() -> None:
            engine = server.engine_pid
            await test(server)
            assert await server.until_idle() == {}
            assert server.engine_pid == engine
            assert (await server.get("/health")).status == 200
            assert (await ask(server, SMALL)).status == 200

        asyncio.run(whole())

    return wrapped


@contextlib.contextmanager
def stopped(server: Served) -> Iterator[None]:
    """The engine does nothing meanwhile."""
    engine = server.engine_pid
    assert engine is not None
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


async def ask(server: Served, body: dict, sent: Callable[[], None] | None = None) -> Answer:
    return await server.post("/v1/completions", json.dumps(body).encode(), sent=sent)


def refused(answer: Answer) -> bool:
    """Told to try again, and when."""
    if answer.status not in (429, 503):
        return False
    assert "retry-after" in answer.headers
    assert json.loads(answer.body)["error"]["message"]
    return True


@run
async def test_a_thousand_long_prompts(server: Served):
    """All begin alike, so that what is answered takes little time."""
    common, on_their_way = [5 + i % 200 for i in range(7990)], 0

    def sent() -> None:
        nonlocal on_their_way
        on_their_way += 1

    async def one(i: int) -> Answer:
        await asyncio.sleep(0.002 * i)
        return await ask(server, {"prompt": [*common, *(1 + i // 7**k % 7 for k in range(10))], "max_tokens": 1}, sent)

    with stopped(server):
        asked = [asyncio.create_task(one(i)) for i in range(1000)]
        began = time.monotonic()
        while on_their_way < 1000 and time.monotonic() - began < 30:
            assert (await server.get("/version", 5)).status == 200
            await asyncio.sleep(0.1)
        assert on_their_way == 1000
        await asyncio.sleep(1)
    answers = await asyncio.gather(*asked)
    statuses = Counter(answer.status for answer in answers)
    assert all(refused(answer) for answer in answers if answer.status != 200), statuses
    assert all(len(json.loads(answer.body)["choices"]) == 1 for answer in answers if answer.status == 200)


@run
async def test_a_short_stop_refuses_nobody(server: Served):
    with stopped(server):
        asked = [asyncio.create_task(ask(server, SMALL | {"user": "x" * 100_000})) for _ in range(200)]
        await asyncio.sleep(1.5)
    answers = await asyncio.gather(*asked)
    assert {answer.status for answer in answers} == {200}


@run
async def test_many_prompts_in_one_request(server: Served):
    prompts = [[5 + i % 200] * (i % 60 + 1) for i in range(1024)]
    for stop in (False, True):
        with stopped(server) if stop else contextlib.nullcontext():
            asked = asyncio.create_task(ask(server, {"prompt": prompts, "max_tokens": 2, "ignore_eos": True}))
            await asyncio.sleep(1)
        answer = await asked
        assert answer.status == 200
        assert [choice["index"] for choice in json.loads(answer.body)["choices"]] == list(range(1024))


@run
async def test_clients_that_leave_meanwhile(server: Served):
    async def leave(i: int) -> None:
        body = {"prompt": f"{i}" * 50, "max_tokens": 500, "ignore_eos": True, "stream": i % 2 == 0}
        if i % 3 == 0:
            body["prompt"] = [body["prompt"]] * 2
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_bytes("POST", "/v1/completions", json.dumps(body).encode()))
        await writer.drain()
        await asyncio.sleep(0.5 + i % 5 / 10)
        writer.close()

    with stopped(server):
        began = time.monotonic()
        await asyncio.gather(*(leave(i) for i in range(400)))
        assert time.monotonic() - began < 3.5
        assert (await server.get("/health")).status == 200
    assert await server.until_idle(10) == {}


@run
async def test_an_answer_of_fifty_megabytes(server: Served):
    """`prompt_logprobs` of a long prompt are all in the message of one step."""
    prompt = [5 + i * i % 200 for i in range(8900)]
    answer = await ask(server, {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 100})
    assert answer.status == 200
    assert len(json.loads(answer.body)["choices"][0]["prompt_logprobs"]) == 8900
    assert len(answer.body) > 50_000_000


@run
async def test_an_engine_that_stands_still_for_long(server: Served):
    """Whoever it has not confirmed is refused in the time that was promised; /health says so until it goes on."""
    with stopped(server):
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(server, SMALL) for _ in range(50)))
        assert 3.5 < time.monotonic() - began < 8
        assert all(refused(answer) and answer.status == 503 for answer in answers)
        await asyncio.sleep(2)
        assert (await server.get("/health")).status == 503
    await asyncio.sleep(0.5)


def test_a_client_of_two_prompts_that_leaves_holds_up_no_end(tmp_path: Path):
    server = Served(save_tiny_model(tmp_path), tmp_path / "log", "--max-num-seqs", "1")

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = {"prompt": ["x", "y"], "max_tokens": 250, "ignore_eos": True}
        writer.write(request_bytes("POST", "/v1/completions", json.dumps(body).encode()))
        await writer.drain()
        while not await server.open_work():
            await asyncio.sleep(0.01)
        writer.close()

    try:
        asyncio.run(leave())
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()


def test_no_number_of_deaths_ends_the_server(tmp_path: Path):
    """Nor does one while the engine before it is being replaced."""
    server = Served(save_tiny_model(tmp_path), tmp_path / "log")

    async def die() -> None:
        for _ in range(5):
            engine = server.engine_pid
            asked = asyncio.create_task(ask(server, {"prompt": "x", "max_tokens": 200, "ignore_eos": True}))
            await asyncio.sleep(0.1)
            assert engine is not None
            os.kill(engine, signal.SIGKILL)
            assert (await asked).status in (200, 503)
            async with asyncio.timeout(30):
                while server.engine_pid in (None, engine) or (await server.get("/ready")).status != 200:
                    assert (await server.get("/health")).status == 200
                    await asyncio.sleep(0.05)
        assert (await ask(server, SMALL)).status == 200

    try:
        asyncio.run(die())
        assert server.stop() == 0
    finally:
        server.kill()
