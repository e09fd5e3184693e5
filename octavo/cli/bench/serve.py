"""`octavo bench serve`: a load of streamed requests on a running server, at a rate or with a number of open ones.

It measures what `vllm bench serve` measures under the same names. A request begins when it is sent. TTFT: until its
first chunk with a choice. ITL: between two such chunks. E2EL: until the last one. TPOT: (E2EL - TTFT) by the tokens
after the first, as the server counts them. Throughput: all tokens, by the time from the first request to the last end.
Speaks HTTP/1.1 by itself, since a client library would cost more of a small machine than the server does.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from octavo.cli.bench import percentiles, print_json, print_table
from octavo.cli.bench.workloads import WORKLOADS, between, workload
from octavo.errors import ConfigError, OctavoError

READY_SECONDS = 600.0  # a large model loads for minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    group.add_argument("--model", metavar="NAME", help="name of the model (default: the first that the server lists)")
    group.add_argument("--api-key", metavar="KEY", help="the server's key (default: OPENAI_API_KEY)")
    group = parser.add_argument_group("workload")
    group.add_argument("--work", metavar="NAME", help=f"one of {', '.join(WORKLOADS)}, in place of a shape")
    lengths: Any = {"type": _lengths, "default": (64, 64), "metavar": "N|N-M"}
    group.add_argument("--input-len", **lengths, help="tokens of a prompt, or from N to M of them (default: 64)")
    group.add_argument("--output-len", **lengths, help="tokens to generate, or from N to M of them (default: 64)")
    group.add_argument("--num-prompts", type=int, default=64, metavar="N", help="requests (default: 64)")
    group.add_argument("--concurrency", type=int, default=32, metavar="N", help="open requests at most (default: 32)")
    group.add_argument(
        "--request-rate", type=float, metavar="X", help="requests a second, arriving at random (Poisson)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals; of another load, another"
    )


def _lengths(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


@dataclass(slots=True)
class Measured:
    """One request: seconds to the first token, between tokens, and in all; tokens received."""

    first: float = 0.0
    between: list[float] = field(default_factory=list)
    whole: float = 0.0
    tokens: int = 0


def run(arguments: argparse.Namespace) -> int:
    return asyncio.run(_bench(arguments))


async def _bench(arguments: argparse.Namespace) -> int:
    server = _Server(arguments.url, arguments.api_key or os.environ.get("OPENAI_API_KEY"))
    await server.ready()
    model = arguments.model or await server.first_model()
    shape = (arguments.num_prompts, arguments.input_len, arguments.output_len)
    prompts, lengths = workload(arguments.work) if arguments.work else between(*shape, arguments.seed)
    gate = asyncio.Semaphore(arguments.concurrency)
    arrivals = random.Random(arguments.seed)

    async def one(prompt: list[int], length: int) -> Measured:
        async with gate:
            body = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
            return await server.stream(body | {"stream": True, "stream_options": {"include_usage": True}})

    began = time.perf_counter()
    tasks = []
    for prompt, length in zip(prompts, lengths, strict=True):
        tasks.append(asyncio.create_task(one(prompt, length)))
        if arguments.request_rate:
            await asyncio.sleep(arrivals.expovariate(arguments.request_rate))
    done = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    _report(done, sum(map(len, prompts)), seconds, model, arguments)
    return 0


def _report(
    done: list[Measured], prompt_tokens: int, seconds: float, model: str, arguments: argparse.Namespace
) -> None:
    tokens = sum(each.tokens for each in done)
    per_token = [(each.whole - each.first) / (each.tokens - 1) for each in done if each.tokens > 1]
    figures = {
        "TTFT": [each.first for each in done],
        "TPOT": per_token,
        "ITL": [gap for each in done for gap in each.between],
        "E2EL": [each.whole for each in done],
    }
    rows: list[dict[str, Any]] = [{"what": name, **percentiles(times)} for name, times in figures.items() if times]
    print_table(rows)
    print(
        f"{len(done)} requests in {seconds:.2f} s: {len(done) / seconds:.2f} requests/s,"
        f" {tokens / seconds:,.1f} output tokens/s, {(prompt_tokens + tokens) / seconds:,.1f} tokens/s in all"
    )
    totals = {
        "benchmark": "serve",
        "model": model,
        "concurrency": arguments.concurrency,
        "request_rate": arguments.request_rate,
        "requests": len(done),
        "seconds": round(seconds, 3),
        "requests_s": round(len(done) / seconds, 2),
        "out_tok_s": round(tokens / seconds, 1),
        "total_tok_s": round((prompt_tokens + tokens) / seconds, 1),
    }
    print_json(totals | {"rows": rows})


class _Server:
    """Just enough of an HTTP client: one connection a request, server-sent events."""

    def __init__(self, url: str, api_key: str | None):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"url is {url!r}; write it as http://HOST:PORT")
        self.url, self.host, self.port = url, parts.hostname, parts.port or 80
        self.key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def ready(self) -> None:
        """Waits until the server takes requests, as /ready tells; raises `OctavoError` after `READY_SECONDS`."""
        end = time.monotonic() + READY_SECONDS
        waits = False
        while True:
            status, reason = await self._status("/ready")
            if status in (200, 404):  # other servers have no such path
                return
            if time.monotonic() > end:
                raise OctavoError(f"{self.url} is not ready after {READY_SECONDS:g} s: {reason}")
            if not waits:
                print(f"waiting for {self.url}: {reason}", file=sys.stderr)
            waits = True
            await asyncio.sleep(0.2)

    async def _status(self, path: str) -> tuple[int, str]:
        """The status of GET `path`, and the beginning of what came with it."""
        reader, writer = await self._connect()
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status = head.partition(b" ")[2][:3]
        return int(status) if status.isdigit() else 0, body.decode(errors="replace")[:200]

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(self.host, self.port, limit=2**24)
        except OSError as error:
            raise OctavoError(f"no server answers at {self.url} ({error}); start one with octavo serve") from None

    async def first_model(self) -> str:
        lines = [line async for line in self._lines("GET", "/v1/models", b"")]
        name: str = json.loads(b"".join(lines))["data"][0]["id"]
        return name

    async def stream(self, body: dict[str, Any]) -> Measured:
        measured, began, last = Measured(), time.perf_counter(), 0.0
        async for line in self._lines("POST", "/v1/completions", json.dumps(body).encode()):
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            now = time.perf_counter()
            # Most events only count, and reading them all would take from the server whatever cores it shares with us.
            if not measured.first or b'"error"' in line or b'"usage"' in line:
                event = json.loads(line[6:])
                if "error" in event:
                    raise OctavoError(f"{self.url} answered: {event['error']['message']}")
                if event.get("usage"):
                    measured.tokens = event["usage"]["completion_tokens"]
                if not event.get("choices"):
                    continue
            if measured.first:
                measured.between.append(now - last)
            else:
                measured.first = now - began
            measured.whole, last = now - began, now
        return measured

    async def _lines(self, method: str, path: str, body: bytes) -> Any:
        reader, writer = await self._connect()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n{self.key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            status = (await reader.readline()).decode()
            chunked = False
            while (header := (await reader.readline()).decode().strip().lower()) != "":
                chunked = chunked or header == "transfer-encoding: chunked"
            if " 200 " not in status:
                raise OctavoError(f"{self.url}{path} answered {status.strip()}: {(await reader.read()).decode()[:500]}")
            rest = b""
            chunks = _Chunks() if chunked else None
            while data := await reader.read(2**16):
                *lines, rest = (rest + (chunks.payload(data) if chunks else data)).split(b"\n")
                for line in lines:
                    yield line.rstrip()
                if chunks and chunks.ended:
                    break
            if rest:
                yield rest
        finally:
            writer.close()


class _Chunks:
    """A body in chunked encoding, piece by piece: `payload` gives what whole chunks have come of it."""

    def __init__(self) -> None:
        self.ended = False
        self._data = b""

    def payload(self, data: bytes) -> bytes:
        self._data += data
        parts, place = [], 0
        while not self.ended and (end := self._data.find(b"\r\n", place)) >= 0:
            size = int(self._data[place:end], 16)
            if len(self._data) < end + 2 + size + 2:
                break
            parts.append(self._data[end + 2 : end + 2 + size])
            place = end + 2 + size + 2
            self.ended = size == 0
        self._data = self._data[place:]
        return b"".join(parts)
