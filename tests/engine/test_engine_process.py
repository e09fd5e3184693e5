"""An engine process of its own around a tiny model: signals, a violent end, a parent that forgets it."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octavo.config import EngineOptions
from octavo.engine.process import EngineClient, Stream
from octavo.errors import EngineDeadError
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
        """A process whose pipe is closed long before it ends."""

        exitcode = -signal.SIGKILL

        def kill(self) -> None: ...

        def join(self, timeout: float | None = None) -> None:
            time.sleep(0.3)

    async def live() -> float:
        client = EngineClient(EngineOptions())
        ours, theirs = multiprocessing.Pipe()
        client._connection, client._process = ours, Slow()  # type: ignore[assignment]
        theirs.close()
        began = time.monotonic()
        client._receive()
        assert client.info is None
        seconds = time.monotonic() - began
        assert client._mourning is not None
        await client._mourning
        assert "SIGKILL" in client._last_words
        return seconds

    assert asyncio.run(live()) < 0.2
