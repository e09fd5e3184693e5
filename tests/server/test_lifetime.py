"""The server as a process: the openai client, clients that go away, signals, a dying engine, a taken port."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from octavo.config import ServerOptions
from octavo.errors import ConfigError
from octavo.server.run import listen
from tests.served import request_bytes

TEXT = "Hi, wörld! " * 3


class Process:
    """A server in a process of its own; its standard error gathers in a file."""

    def __init__(self, log: Path, **settings):
        with log.open("w") as file:
            command = [sys.executable, str(Path(__file__).with_name("process.py")), json.dumps(settings)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        self._log = log
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.url = self.first_line.split()[-1]
        self.curl = [self.process.stdout.readline() for _ in range(2)][-1].strip()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def ends(self) -> int:
        return self.process.wait(10)


@contextlib.contextmanager
def server(tmp_path: Path, **settings) -> Iterator[Process]:
    process = Process(tmp_path / "log", **settings)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        assert process.process.stdout is not None
        process.process.stdout.close()


def wait_until(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def ask(content: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": content}], **fields}


def test_the_openai_client_and_the_printed_line(tmp_path: Path):
    with server(tmp_path) as process:
        assert process.first_line.startswith("tiny is served at http://127.0.0.1:")
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none") as client:
            messages = [{"role": "user", "content": "hello"}]
            whole = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=1)
            assert whole.choices[0].message.content == TEXT
            assert whole.choices[0].logprobs.content[0].token == "H"
            with client.chat.completions.create(
                model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
            ) as stream:
                chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
            assert chunks[-1].usage == whole.usage
            messages += [whole.choices[0].message]
            assert client.chat.completions.create(model="tiny", messages=messages).choices
            completion = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=1)
            assert [choice.text for choice in completion.choices] == ["Hi, "] * 2
            assert [model.id for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.NotFoundError) as missing:
                client.models.retrieve("other")
            assert missing.value.code == "model_not_found"
        answer = subprocess.run(process.curl, shell=True, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["message"]["content"] == TEXT
        process.process.send_signal(signal.SIGTERM)
        assert process.ends() == 0, process.log
        for phase in ("ready after", "files", "http", "tokenizer", "engine ready"):
            assert phase in process.log


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(tmp_path: Path, stream: bool):
    with server(tmp_path) as process:
        body = json.dumps(ask("slow", stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", int(process.url.rsplit(":")[-1]))) as client:
            client.sendall(request_bytes("POST", "/v1/chat/completions", body))
            wait_until(lambda: process.metric('octavo_kv_blocks{state="owned"}') == 1)
            if stream:
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: process.metric('octavo_kv_blocks{state="owned"}') == 0, seconds=0.6)


def test_a_signal_drains(tmp_path: Path):
    async def ask_and_stop(process: Process) -> None:
        async with httpx.AsyncClient(base_url=process.url) as client:
            running = asyncio.create_task(client.post("/v1/chat/completions", json=ask("slow")))
            await asyncio.sleep(0.2)
            process.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            refused = await client.post("/v1/chat/completions", json=ask("hello"))
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert (await running).json()["choices"][0]["message"]["content"] == TEXT

    with server(tmp_path) as process:
        asyncio.run(ask_and_stop(process))
        assert process.ends() == 0
        assert "draining: 1 open requests" in process.log


@pytest.mark.parametrize("how", ["second signal", "time is up"])
def test_what_does_not_finish_is_aborted(tmp_path: Path, how: str):
    async def ask_and_stop(process: Process) -> None:
        async with httpx.AsyncClient(base_url=process.url) as client:
            running = asyncio.create_task(client.post("/v1/chat/completions", json=ask("slow", stream=True)))
            await asyncio.sleep(0.2)
            process.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.1)
            if how == "second signal":
                process.process.send_signal(signal.SIGTERM)
            answer = await running
            assert "the server is shutting down" in answer.text
            assert "[DONE]" not in answer.text

    with server(tmp_path, options={"drain_seconds": 30 if how == "second signal" else 0.2}) as process:
        began = time.monotonic()
        asyncio.run(ask_and_stop(process))
        assert process.ends() == 0
        assert time.monotonic() - began < 2
        assert "aborting 1 request" in process.log


def test_a_dead_engine_comes_back(tmp_path: Path):
    with server(tmp_path) as process:
        answer = httpx.post(f"{process.url}/v1/chat/completions", json=ask("die"))
        assert answer.status_code == 503
        assert "killed by SIGKILL" in answer.json()["error"]["message"]
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 200)
        assert httpx.post(f"{process.url}/v1/chat/completions", json=ask("hello")).status_code == 200
        assert "the engine is back" in process.log


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"on_engine_death": "exit"}}, "octavo: error: the engine died: killed by SIGKILL"),
        ({"stays_dead": True}, "times in a row: no luck"),
    ],
    ids=["exit", "restart in vain"],
)
def test_an_engine_that_stays_dead_ends_the_server(tmp_path: Path, settings: dict, words: str):
    with server(tmp_path, **settings) as process:
        assert httpx.post(f"{process.url}/v1/chat/completions", json=ask("die")).status_code == 503
        assert process.ends() == 2
        assert words in process.log


def test_an_idle_server_sleeps(tmp_path: Path):
    with server(tmp_path) as process:
        httpx.post(f"{process.url}/v1/chat/completions", json=ask("hello"))
        stat = Path(f"/proc/{process.process.pid}/status")
        if not stat.exists():
            pytest.skip("counts wake-ups as Linux tells them")

        def wakeups() -> int:
            return int(next(line for line in stat.read_text().splitlines() if line.startswith("voluntary")).split()[1])

        time.sleep(0.3)
        before = wakeups()
        time.sleep(1)
        assert wakeups() - before <= 2


def test_a_taken_port_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use .* --port"):
            listen(ServerOptions(port=port)).__enter__()
    with pytest.raises(ConfigError, match="--host"):
        listen(ServerOptions(host="192.0.2.1", port=0)).__enter__()
    with pytest.raises(ConfigError, match="port is 99999"):
        ServerOptions(port=99999)
    if os.geteuid():
        with pytest.raises(ConfigError, match="--port"):
            listen(ServerOptions(port=80)).__enter__()
