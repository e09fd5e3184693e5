"""`octavo serve` as users run it: a process over a tiny random model, and what can be seen of it from outside.

For long runs over real sockets. The model speaks bytes and has a chat template; its words are noise.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.server.double import TEMPLATE, byte_tokenizer
from tests.tiny_models import save_llama

ROOT = Path(__file__).parents[1]
VOCABULARY = 258  # tokens: the bytes in the library's order, <s> and </s>
BEGIN, END = 256, 257
CONTEXT = 256  # tokens


def save_tiny_model(folder: Path, context: int = CONTEXT) -> Path:
    """A folder named `tiny`, as a hub would have it."""
    path = save_llama(
        folder / "tiny",
        vocab_size=VOCABULARY,
        bos_token_id=BEGIN,
        eos_token_id=END,
        max_position_embeddings=context,
    )
    byte_tokenizer().library.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@dataclass(slots=True)
class Answer:
    """What came back over a connection: `ended` says that all of it did. Names of headers are in lower case."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False


class BadAnswerError(Exception):
    """What came is no HTTP."""


async def read_answer(reader: asyncio.StreamReader, method: str = "POST") -> Answer | None:
    """The next answer; None if the connection ends without one, and not `ended` if it ends within."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadAnswerError(f"a connection ended after {error.partial[:200]!r}") from None
        return None
    except (ConnectionError, asyncio.LimitOverrunError):
        return None
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdecimal():
        raise BadAnswerError(f"{first[:200]!r} is no status line")
    answer = Answer(int(parts[1]))
    for line in lines:
        name, _, value = line.partition(":")
        answer.headers[name.strip().lower()] = value.strip()
    if answer.status == 100:
        return await read_answer(reader, method)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        if method == "HEAD" or answer.status in (204, 304):
            pass
        elif answer.headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in _chunks(reader):
                answer.body += piece
        elif "content-length" in answer.headers:
            answer.body = await reader.readexactly(int(answer.headers["content-length"]))
        else:
            answer.body = await reader.read()
        answer.ended = True
    return answer


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


def request_bytes(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """`headers` are lines that each end with CRLF; a body is JSON unless they say otherwise."""
    if body and "content-type:" not in headers.lower():
        headers = f"Content-Type: application/json\r\n{headers}"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


class Served:
    """A server and its engine, two processes. `log` is a file that standard error goes to."""

    def __init__(self, model: Path, log: Path, *options: str):
        self.log = log
        with log.open("w") as file:
            command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--device", "cpu", *options]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, cwd=ROOT, env=environment, text=True
            )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        if " is served at http://127.0.0.1:" not in self.first_line:
            self.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        self.port = int(self.first_line.split()[-1].rsplit(":")[-1])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, if there is one now."""
        return next(iter(children(self.pid)), None)

    async def get(self, path: str, seconds: float = 30.0) -> Answer:
        """Raises `TimeoutError` or `OSError` where the server does not answer."""
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(request_bytes("GET", path, headers="Connection: close\r\n"))
                answer = await read_answer(reader)
            finally:
                writer.close()
        if answer is None:
            raise ConnectionResetError(f"no answer to GET {path}")
        return answer

    async def post(
        self, path: str, body: bytes, seconds: float = 120.0, sent: Callable[[], None] | None = None
    ) -> Answer:
        """The whole answer to a POST on a connection of its own, which may come before the body is sent. Says `sent()`
        when it is. Raises `TimeoutError` or `OSError`."""

        async def send() -> None:
            writer.write(request_bytes("POST", path, body, "Connection: close\r\n"))
            await writer.drain()
            if sent is not None:
                sent()

        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            sending = asyncio.create_task(send())
            try:
                answer = await read_answer(reader)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                writer.close()
        if answer is None or not answer.ended:
            raise ConnectionResetError(f"no whole answer to POST {path}")
        return answer

    async def metrics(self) -> dict[str, float]:
        """Each metric's value, by its name with labels."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    async def open_work(self) -> dict[str, float]:
        """What the engine still has of requests; empty if nothing."""
        metrics = await self.metrics()
        names = ("octavo_requests_running", "octavo_requests_waiting", 'octavo_kv_blocks{state="owned"}')
        return {name: metrics[name] for name in names if metrics[name]}

    async def until_idle(self, seconds: float = 30.0) -> dict[str, float]:
        """Waits until nothing runs; what is left after so long."""
        end = time.monotonic() + seconds
        while left := await self.open_work():
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.1)
        return left

    def stop(self, seconds: float = 40.0) -> int:
        """SIGTERM; the exit code. Raises `subprocess.TimeoutExpired` if the server does not end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def children(pid: int) -> list[int]:
    """Process ids of the children of `pid`, oldest first."""
    shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = (map(int, line.split()) for line in shown.splitlines())
    return sorted(child for child, parent in pairs if parent == pid)
