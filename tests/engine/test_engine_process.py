"""An engine process of its own around a tiny model: signals, a violent end, a parent that forgets it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineOptions
from octavo.engine import process
from octavo.engine.channel import EngineChannel, connected_pair
from octavo.engine.process import EngineClient
from octavo.engine.stream import Stream
from octavo.errors import EngineDeadError, EngineStalledError, OctavoError, QueueFullError, RequestError
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.tiny_models import save_llama

FORGETFUL = """
import asyncio, sys
from octavo.config import EngineOptions
from octavo.engine.process import EngineClient

if __name__ == "__main__":
    client = EngineClient(EngineOptions(model=sys.argv[1], kv_cache_memory=2**20))
    asyncio.run(client.start())
    print(client._process.pid, flush=True)
"""


async def tokens_of(stream: Stream) -> list[int]:
    return [token[2] async for arrived in stream for token in arrived.tokens]


def test_a_process_that_is_told_to_end_and_one_that_is_killed(tmp_path: Path):
    options = EngineOptions(model=str(save_llama(tmp_path)), kv_cache_memory=2**20)
    deaths: list[str] = []

    async def live() -> None:
        client = EngineClient(options)
        client.on_death = deaths.append
        await client.start()
        assert client._process is not None
        pid = client._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)  # as a stop of the whole process group would
        params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        assert len(await tokens_of(client.submit(Request("a", [5, 6, 7], params)))) == 5
        assert client.trouble(10) is None
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        stream = client.submit(Request("b", [5, 6, 7], params))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await tokens_of(stream)
        assert "SIGKILL" in (client.trouble(10) or "")
        await client.close()

    asyncio.run(live())
    assert deaths == ["killed by SIGKILL"]


def test_a_parent_that_ends_without_closing_leaves_nobody_behind(tmp_path: Path):
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(save_llama(tmp_path / "model"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pid = int(done.stdout)
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the engine process lives on")


def test_the_event_loop_goes_on_while_a_dead_engine_is_waited_for():
    class Slow:
        """A process whose channel is closed long before it ends."""

        returncode = -signal.SIGKILL

        def wait(self, timeout: float | None = None) -> int:
            time.sleep(0.3)
            return self.returncode

    async def live() -> float:
        client = EngineClient(EngineOptions())
        client._process = Slow()  # type: ignore[assignment]
        began = time.monotonic()
        client.lost()
        assert client.info is None
        seconds = time.monotonic() - began
        assert client._burying is not None
        await client._burying
        assert "SIGKILL" in client._exit_reason
        return seconds

    assert asyncio.run(live()) < 0.2


# ---- an engine that is stopped for a while ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def held_engine(folder: Path, **settings: Any) -> AsyncIterator[tuple[EngineClient, Callable[[], None]]]:
    """A client of an engine that is stopped as if the system gave it no time, and what lets it go on."""
    client = EngineClient(EngineOptions(model=str(save_llama(folder)), kv_cache_memory=2**22), **settings)
    await client.start()
    assert client._process is not None
    process = client._process
    process.send_signal(signal.SIGSTOP)
    try:
        yield client, lambda: process.send_signal(signal.SIGCONT)
    finally:
        process.send_signal(signal.SIGCONT)
        await client.close()


def request_of(name: str, length: int = 60) -> Request:
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    return Request(name, [3 + i % 150 for i in range(length)], params)


async def outcome(stream: Stream) -> str:
    try:
        return f"{len(await tokens_of(stream))} tokens"
    except OctavoError as error:
        return type(error).__name__


def test_a_burst_while_the_engine_is_stopped_loses_nothing(tmp_path: Path):
    async def burst() -> None:
        async with held_engine(tmp_path, max_queued_requests=2000) as (client, go_on):
            # Far more than the sockets between the processes hold.
            streams = [client.submit(request_of(f"r{i}", 100)) for i in range(2000)]
            for i in range(0, 2000, 5):
                client.abort(f"r{i}")
            await asyncio.sleep(0.2)
            go_on()
            outcomes = await asyncio.gather(*(outcome(stream) for i, stream in enumerate(streams) if i % 5))
            assert set(outcomes) == {"2 tokens"}
            assert client.num_open == client._num_queued == client._queued_tokens == client._unconfirmed_bytes == 0

    asyncio.run(asyncio.wait_for(burst(), 60))


def test_what_the_engine_does_not_confirm_in_time_is_refused_and_then_it_serves_again(tmp_path: Path):
    async def burst() -> None:
        async with held_engine(tmp_path, confirm_timeout=0.5) as (client, go_on):
            streams = [client.submit(request_of(f"r{i}")) for i in range(300)]
            assert client.trouble(0.5) is None
            assert {await outcome(stream) for stream in streams} == {"EngineStalledError"}
            with pytest.raises(EngineStalledError, match="--confirm-timeout"):
                client.submit(request_of("late"))  # at once: nothing more is sent to an engine that is stuck
            assert "has not confirmed" in (client.trouble(0.5) or "")
            go_on()
            while client.trouble(0.5):
                await asyncio.sleep(0.02)
            assert await outcome(client.submit(request_of("after"))) == "2 tokens"
            assert client.num_open == client._num_queued == 0

    asyncio.run(asyncio.wait_for(burst(), 30))


def test_an_event_loop_that_is_held_up_refuses_nothing(tmp_path: Path):
    async def live() -> None:
        async with held_engine(tmp_path, confirm_timeout=0.3) as (client, go_on):
            go_on()
            stream = client.submit(request_of("r"))
            await asyncio.sleep(0)
            time.sleep(1.5)
            assert await outcome(stream) == "2 tokens"

    asyncio.run(asyncio.wait_for(live(), 30))


def test_a_queue_has_bounds_in_requests_tokens_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def fill() -> None:
        async with held_engine(tmp_path, max_queued_requests=5) as (client, _):
            for i in range(5):
                client.submit(request_of(f"r{i}"))
            with pytest.raises(QueueFullError, match=r"5 requests .* --max-queued-requests"):
                client.submit(request_of("more"))
            client.abort("r0")
            for bound, words in (
                ("QUEUED_TOKENS", "240 tokens are waiting"),
                ("UNCONFIRMED_BYTES", "bytes of requests"),
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(process, f"MAX_{bound}", 100)
                    with pytest.raises(QueueFullError, match=words):
                        client.submit(request_of("more"))
            client.submit(request_of("more"))
            with pytest.raises(RequestError, match="request_id 'more'"):
                client.submit(request_of("more"))

    asyncio.run(asyncio.wait_for(fill(), 30))


def test_a_step_that_hangs_is_noticed_although_the_engine_confirms(tmp_path: Path):
    async def live() -> None:
        client = EngineClient(EngineOptions(model=str(save_llama(tmp_path)), kv_cache_memory=2**22))
        await client.start()
        stream = client.submit(request_of("r"))
        assert await outcome(stream) == "2 tokens"
        # As an engine does whose main thread is stuck: it confirms, and says nothing else.
        client._heard = 0.0
        client._deliver = lambda output: None  # type: ignore[method-assign]
        client.submit(request_of("stuck"))
        assert client.trouble(0.2) is None, "it was idle until now"
        await asyncio.sleep(0.5)
        assert not client._unconfirmed
        assert "a step has been pending" in (client.trouble(0.2) or "")
        await client.close()

    asyncio.run(asyncio.wait_for(live(), 30))


HANGS = """
import sys, time
from octavo.engine import engine, loop
from octavo.engine.channel import EngineChannel
import socket
def hang(self):
    print("a step began", flush=True)
    while True:
        time.sleep(1)
engine.Engine.step = hang
loop._EXIT_SECONDS = 0.5
loop.run_engine(EngineChannel(socket.socket(fileno=int(sys.argv[1]))))
"""


def test_an_engine_whose_main_thread_hangs_ends_with_its_parent(tmp_path: Path):
    ours, theirs = connected_pair()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HANGS, str(theirs.fileno())]
    with theirs:
        descriptors = (theirs.fileno(),)
        hanging = subprocess.Popen(command, env=environment, pass_fds=descriptors, stdout=subprocess.PIPE)
    channel = EngineChannel(ours)
    channel.send("start", EngineOptions(model=str(save_llama(tmp_path)), kv_cache_memory=2**22), False, "text")
    assert channel.receive()[0] == "ready"
    channel.send("add", request_of("r"))
    assert channel.receive() == ("confirmed",), "a thread of its own confirms"
    assert hanging.stdout is not None
    with hanging.stdout as out:
        assert out.readline() == b"a step began\n"
    ours.close()
    assert hanging.wait(10) == 1
