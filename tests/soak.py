"""A server under twice the load it can take, for long: clients that leave or stop reading, an engine that is killed.

Each request must come to an end that its client can see, and when the load stops the server must hold what it held
before: no more memory, descriptors, threads, sockets or blocks. Raises nothing for a fault: it is told and counted.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.served import Answer, BadAnswerError, Served, read_answer, request_bytes, save_tiny_model

MAX_NUM_SEQS, MAX_QUEUED = 8, 8
CLIENTS = 2 * (MAX_NUM_SEQS + MAX_QUEUED)
OPTIONS = (
    *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queued-requests", str(MAX_QUEUED), "--max-num-batched-tokens", "64"),
    # So little memory that requests wait for it.
    *("--max-model-len", "256", "--drain-seconds", "10"),
)
TINY_OPTIONS = ("--kv-cache-memory", "640KiB")
# In seconds. What a client waits for its answer's end; for the engine to be back, or the load to end.
ANSWER_SECONDS, RECOVERY_SECONDS = 60.0, 60.0
WARM_UP_SECONDS = 8.0
# What may be more than after the warm-up. Memory: what allocators keep of the largest moments, in bytes and as a share.
MORE_BYTES, MORE_SHARE = 40 * 2**20, 0.15
MORE_DESCRIPTORS, MORE_THREADS = 3, 2

# Prompts of which the answer must always be the same.
_AGAIN = ("a", "the same", "again and again and again and again and again", "x" * 100)
ENDS = ("answered", "429", "503", "error in the stream", "left", "not read")


# ---- what clients do ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Wish:
    """One request: `how` is read, leave, half, stall (read on after a while) or ignore (never read)."""

    path: str
    body: dict[str, Any]
    how: str
    after: int  # bytes of the answer, or of the request, until the client does what is odd
    again: bool = False  # whether the answer must be the one that this prompt had before


def wish(rng: random.Random, chat: bool) -> Wish:
    words = "".join(rng.choice("abcdefgh ijk\n") for _ in range(rng.choice([1, 5, 20, 60, 120])))
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 8, 30, 60, 100]), "stream": rng.random() < 0.5}
    if rng.random() < 0.6:
        body["ignore_eos"] = True
    if rng.random() < 0.25:
        body["n"] = rng.choice([2, 3, 4])
    if rng.random() < 0.2:
        body |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    if rng.random() < 0.2:
        body["stop"] = rng.sample("abcdefgh", 3)
    if rng.random() < 0.2:
        body["temperature"] = 0
    if rng.random() < 0.1:
        body["seed"] = rng.randrange(2**32)
    if rng.random() < 0.05:
        body = {"max_tokens": 20, "stream": body["stream"], "use_beam_search": True, "n": 2}
    if rng.random() < 0.1:
        body = {"max_tokens": 60, "stream": False, "temperature": 0, "prompt": rng.choice(_AGAIN)}
        return Wish("/v1/completions", body, "read", 0, again=True)
    if chat and rng.random() < 0.4:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": words[:60]}]
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": rng.choice([0, 5, 20])}
    else:
        path, body["prompt"] = "/v1/completions", words
        if rng.random() < 0.3:
            body["logprobs"] = rng.choice([0, 5, 20])
    how = rng.choices(["read", "leave", "half", "stall", "ignore"], [70, 16, 4, 6, 4])[0]
    return Wish(path, body, how, rng.choice([0, 1, 100, 1000, 5000]))


class LostError(Exception):
    """A request that came to no end, or to one that no client should meet."""


async def ask(port: int, rng: random.Random, wished: Wish, texts: dict[str, str]) -> str:
    """Makes a request; how it ended, one of `ENDS`. Raises `LostError`.

    `texts` are the answers so far to prompts that are asked again.
    """
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            with _socket() as connection:
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
                reader, writer = await asyncio.open_connection(sock=connection, limit=2**16)
                try:
                    return await _exchange(reader, writer, rng, wished, texts)
                finally:
                    writer.close()
    except TimeoutError:
        raise LostError(f"no end within {ANSWER_SECONDS:g} s") from None
    except (BadAnswerError, OSError) as error:
        raise LostError(f"{type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _socket() -> Iterator[socket.socket]:
    """One that takes little ahead of its reader."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        yield connection


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    rng: random.Random,
    wished: Wish,
    texts: dict[str, str],
) -> str:
    sent = request_bytes("POST", wished.path, json.dumps(wished.body).encode(), "Connection: close\r\n")
    if wished.how == "half":
        writer.write(sent[: rng.randrange(1, len(sent))])
        await writer.drain()
        await asyncio.sleep(rng.uniform(0, 0.2))
        return "left"
    writer.write(sent)
    await writer.drain()
    if wished.how == "leave":
        if wished.after == 0:
            await asyncio.sleep(rng.uniform(0, 0.2))
        else:
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readexactly(wished.after)
        return "left"
    if wished.how == "ignore":
        await asyncio.sleep(rng.uniform(1, 5))
        return "not read"
    if wished.how == "stall":
        await asyncio.sleep(rng.uniform(0.5, 3))
    answer = await read_answer(reader)
    if answer is None:
        raise LostError("the connection was closed without an answer")
    return _end_of(wished, answer, texts)


def _end_of(wished: Wish, answer: Answer, texts: dict[str, str]) -> str:
    if not answer.ended:
        raise LostError(f"the answer, {answer.status}, broke off after {len(answer.body)} bytes")
    if answer.status in (429, 503):
        if "retry-after" not in answer.headers:
            raise LostError(f"{answer.status} does not say when to try again")
        return str(answer.status)
    if answer.status != 200:
        raise LostError(f"status {answer.status}: {answer.body[:300]!r}")
    reasons: dict[int, str | None] = {}
    if wished.body["stream"]:
        events = [event[6:] for event in answer.body.split(b"\n\n") if event.startswith(b"data: ")]
        last = events.pop()
        if last != b"[DONE]":
            error = json.loads(last)["error"]
            if error["code"] != "engine_unavailable":
                raise LostError(f"the stream ended with {error}")
            return "error in the stream"
        for event in events:
            for choice in json.loads(event)["choices"]:
                reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    else:
        choices = json.loads(answer.body)["choices"]
        reasons = {choice["index"]: choice["finish_reason"] for choice in choices}
        if wished.again:
            prompt, text = wished.body["prompt"], choices[0]["text"]
            if text != texts.setdefault(prompt, text):
                raise LostError(f"the answer is {text!r} and was {texts[prompt]!r}")
    if len(reasons) != wished.body.get("n", 1) or not set(reasons.values()) <= {"stop", "length"}:
        raise LostError(f"the choices ended with {reasons}")
    return "answered"


# ---- what the server holds ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Holding:
    """What a process holds: bytes in memory, and counts. Zeros where the system does not tell."""

    rss: int = 0
    descriptors: int = 0
    sockets: int = 0
    threads: int = 0

    @classmethod
    def of(cls, pid: int | None) -> "Holding":
        process = Path(f"/proc/{pid}")
        try:
            lines = (process / "status").read_text().splitlines()
            names = dict(line.split(":", 1) for line in lines if ":" in line)
            links = []
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    links.append(str(descriptor.readlink()))
        except OSError:
            return cls()
        sockets = sum(link.startswith("socket:") for link in links)
        return cls(int(names["VmRSS"].split()[0]) * 1024, len(links), sockets, int(names["Threads"]))

    def more_than(self, before: "Holding") -> list[str]:
        """What is held beyond what may be."""
        most = before.rss + max(MORE_BYTES, MORE_SHARE * before.rss)
        more = [f"{self.rss / 2**20:.0f} MiB, {before.rss / 2**20:.0f} before"] if self.rss > most else []
        for name, allowed in (
            ("descriptors", MORE_DESCRIPTORS),
            ("sockets", MORE_DESCRIPTORS),
            ("threads", MORE_THREADS),
        ):
            if (now := getattr(self, name)) > getattr(before, name) + allowed:
                more.append(f"{now} {name}, {getattr(before, name)} before")
        return more

    def __str__(self) -> str:
        counts = f"{self.descriptors} descriptors, {self.sockets} of them sockets, {self.threads} threads"
        return f"{self.rss / 2**20:.0f} MiB, {counts}"


# ---- the whole ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Soak:
    """A soak of one server. `faults` says what went wrong."""

    server: Served
    seed: int
    chat: bool = True
    ends: Counter[str] = field(default_factory=Counter)
    offered: int = 0
    kills: int = 0
    recoveries: list[float] = field(default_factory=list)  # seconds from a kill to /ready
    faults: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    async def run(self, seconds: float, interval: float) -> None:
        """Load for `seconds`, in rounds of `interval` with a kill within each and a look at the idle server after."""
        await self._probe()
        end = time.monotonic() + seconds
        await self._load(min(WARM_UP_SECONDS, seconds / 4), kill=False)
        front, engine = await self._look("the warm-up")
        while (left := end - time.monotonic()) > 1:
            await self._load(min(interval, left), kill=True)
            after = f"kill {self.kills}"
            now_front, now_engine = await self._look(after)
            self._compare(after, "HTTP process", now_front, front)
            self._compare(after, "engine", now_engine, engine)

    async def _probe(self) -> None:
        """Whether the model takes chats."""
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": False}
        rng = random.Random(0)
        try:
            await ask(self.server.port, rng, Wish("/v1/chat/completions", body, "read", 0), {})
        except LostError:
            self.chat = False

    async def _load(self, seconds: float, kill: bool) -> None:
        end = time.monotonic() + seconds
        clients = [asyncio.create_task(self._client(end, number)) for number in range(CLIENTS)]
        if kill:
            rng = random.Random(f"{self.seed}/kill/{self.kills}")
            await asyncio.sleep(seconds * rng.uniform(0.3, 0.7))
            await self._kill()
        await asyncio.gather(*clients)

    async def _client(self, end: float, number: int) -> None:
        """Asks one request after the other until `end`, in seconds of `time.monotonic`."""
        rng = random.Random(f"{self.seed}/{number}/{self.offered}")
        while time.monotonic() < end:
            wished = wish(rng, self.chat)
            self.offered += 1
            try:
                how = await ask(self.server.port, rng, wished, self.texts)
            except LostError as error:
                how = "LOST"
                self._fault(f"lost: {wished}: {error}")
            self.ends[how] += 1
            if how in ("429", "503"):
                await asyncio.sleep(rng.uniform(0.02, 0.2))

    async def _kill(self) -> None:
        pid = self.server.engine_pid
        if pid is None:
            self._fault("there is no engine to kill")
            return
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        began = time.monotonic()
        while self.server.engine_pid in (None, pid) or (await self.server.get("/ready")).status != 200:
            if time.monotonic() - began > RECOVERY_SECONDS:
                self._fault(f"the engine is not back {RECOVERY_SECONDS:g} s after kill {self.kills}")
                return
            await asyncio.sleep(0.05)
        self.recoveries.append(time.monotonic() - began)

    async def _look(self, after: str) -> tuple[Holding, Holding]:
        """What the processes hold, now that nobody asks for anything."""
        if left := await self.server.until_idle(RECOVERY_SECONDS):
            self._fault(f"after {after} there is still {left}")
        if (health := await self.server.get("/health")).status != 200:
            self._fault(f"after {after} /health is {health.status}: {health.body[:200]!r}")
        await asyncio.sleep(0.5)  # connections that were closed last
        front, engine = Holding.of(self.server.pid), Holding.of(self.server.engine_pid)
        metrics = await self.server.metrics()
        done = f"{metrics['octavo_steps_total']:.0f} steps and {metrics['octavo_preemptions_total']:.0f} preemptions"
        self._tell(f"after {after}, {sum(self.ends.values())} requests: HTTP process {front}; engine {engine}, {done}")
        return front, engine

    def _compare(self, after: str, name: str, now: Holding, before: Holding) -> None:
        for more in now.more_than(before):
            self._fault(f"after {after} the {name} holds {more}")

    def finish(self) -> None:
        """Ends the server, and adds up."""
        began = time.monotonic()
        code = self.server.stop()
        self._tell(f"SIGTERM: exit code {code} after {time.monotonic() - began:.1f} s")
        if code:
            self._fault(f"the server ended with {code}")
        if sum(self.ends.values()) != self.offered:
            self._fault(f"{self.offered} requests were offered, and {sum(self.ends.values())} ended")
        if "Traceback" in (said := self.server.log.read_text(errors="replace")):
            self._fault(f"a traceback in the log: {said[said.index('Traceback') :][:2000]}")
        ends = ", ".join(f"{self.ends[name]} {name}" for name in (*ENDS, "LOST"))
        back = ", ".join(f"{seconds:.1f}" for seconds in self.recoveries)
        self._tell(f"{self.offered} requests: {ends}")
        self._tell(f"{self.kills} kills; ready again after {back} s")
        self._tell(f"{len(self.faults)} faults")

    def _fault(self, what: str) -> None:
        self.faults.append(what)
        self._tell(f"FAULT {what}")

    def _tell(self, what: str) -> None:
        print(what, flush=True)


def soak(model: str | None, seconds: float, interval: float, seed: int) -> Soak:
    """Soaks a server of `model`, or of a tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        options = OPTIONS if model else (*OPTIONS, *TINY_OPTIONS)
        server = Served(Path(model) if model else save_tiny_model(path), path / "log", *options)
        try:
            made = Soak(server, seed)
            asyncio.run(made.run(seconds, interval))
            made.finish()
        finally:
            server.kill()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, metavar="X", help="how long (default: 10)")
    parser.add_argument(
        "--kill-every", type=float, default=120, metavar="S", help="seconds between kills (default: 120)"
    )
    parser.add_argument("--seed", type=int, default=1, help="which requests (default: 1)")
    parser.add_argument("--model", help="a model instead of a tiny random one, as `octavo serve` takes it")
    arguments = parser.parse_args()
    done = soak(arguments.model, 60 * arguments.minutes, arguments.kill_every, arguments.seed)
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
