"""How much the HTTP process alone can do: an engine that answers at once, one core for the server, one for the load.

    python benchmarks/http_front.py [--model MODEL] [--seconds 5] [--out FILE] [--profile FILE]

Short chat requests answered whole (requests a second) and streamed (tokens a second). The load is raw sockets with
keep-alive, cheap enough not to be the limit; its own use of its core is printed to show that. Without MODEL the
tokenizer is one of bytes. Prints a table and, as the last line, one JSON object.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the engine double is the tests'

ANSWER_TOKENS = 32
SERVER_CORE, LOAD_CORE = 0, 1


def pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


# ---- the server process ---------------------------------------------------------------------------------------


def serve(model_path: str | None, profile: str | None) -> None:
    """The real server around an engine double; prints its URL."""
    pin(SERVER_CORE)
    from octavo import log
    from octavo.config import ServerOptions
    from octavo.server.metrics import Metrics
    from octavo.server.model import ServedModel
    from octavo.server.run import _loop_factory, listen
    from octavo.server.run import serve as serve_engine
    from octavo.server.service import Service
    from octavo.text.tokenizer import Tokenizer
    from tests.server.double import EngineDouble, byte_tokenizer

    log.setup()
    tokenizer = Tokenizer.load(model_path) if model_path else byte_tokenizer()
    text = "The capital of France is Paris. It lies on the river Seine, and has been the largest city of the country."
    tokens = (tokenizer.encode(text, add_bos=False) * ANSWER_TOKENS)[:ANSWER_TOKENS]
    engine = EngineDouble(
        lambda request, index: list(tokens), -1, vocab_size=tokenizer.vocab_size, max_model_len=2048, num_blocks=4096
    )
    options = ServerOptions(port=0)
    with listen(options) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        service = Service(engine, options, Metrics(lambda: engine.stats))
        main = serve_engine(service, lambda: ServedModel("double", tokenizer), listener, [])
        if profile is None:
            runner.run(main)
            return
        import cProfile

        with cProfile.Profile() as profiler:
            runner.run(main)
        profiler.dump_stats(profile)


# ---- the load -------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, request: bytes, end: bytes, latencies: list[float], deadline: float):
        self.request, self.end, self.latencies, self.deadline = request, end, latencies, deadline
        self.tail = b""
        self.began = 0.0
        self.gone = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.began = time.perf_counter()
        if self.began > self.deadline:
            self.transport.close()
            return
        self.tail = b""
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {data[:300]!r}")
        self.tail = (self.tail + data)[-256:]
        if self.tail.endswith(self.end):
            self.latencies.append(time.perf_counter() - self.began)
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set_result(None)


def request_bytes(stream: bool) -> bytes:
    asked = {
        "model": "double",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": stream,
    }
    body = json.dumps(asked).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used; unlike the clock, it hardly sees what else the machine does."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return math.nan
    user, system = path.read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def load(pid: int, port: int, stream: bool, connections: int, seconds: float) -> dict[str, Any]:
    """Keeps `connections` busy for `seconds`."""
    end = b"0\r\n\r\n" if stream else b'"prompt_logprobs":null}'
    latencies: list[float] = []
    loop, began, used = asyncio.get_running_loop(), time.perf_counter(), time.process_time()
    server_used = processor_seconds(pid)
    clients = []
    for _ in range(connections):
        client = Client(request_bytes(stream), end, latencies, began + seconds)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        clients.append(client)
    await asyncio.gather(*(client.gone for client in clients))
    took = time.perf_counter() - began
    latencies.sort()
    return {
        "workload": "streamed" if stream else "whole",
        "connections": connections,
        "requests_per_second": round(len(latencies) / took, 1),
        "tokens_per_second": round(len(latencies) * ANSWER_TOKENS / took),
        "server_ms_per_request": round((processor_seconds(pid) - server_used) / len(latencies) * 1000, 3),
        "p50_ms": round(latencies[len(latencies) // 2] * 1000, 2),
        "p99_ms": round(latencies[len(latencies) * 99 // 100] * 1000, 2),
        "load_core_percent": round((time.process_time() - used) / took * 100),
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--serve"]
    command += ["--model", arguments.model] if arguments.model else []
    command += ["--profile", arguments.profile] if arguments.profile else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline().rsplit(":", 1)[-1])
    pin(LOAD_CORE)
    try:
        asyncio.run(load(server.pid, port, False, 8, 1.0))  # warm
        runs = [(stream, n) for stream in arguments.modes for n in arguments.connections]
        return [asyncio.run(load(server.pid, port, stream, n, arguments.seconds)) for stream, n in runs]
    finally:
        server.terminate()
        server.wait()


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="known name, GGUF file or folder whose tokenizer and template are used")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each run")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 256], help="open at once")
    parser.add_argument("--modes", type=json.loads, default=[False, True], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file for the JSON result")
    parser.add_argument("--profile", help="file for the server's cProfile statistics (slows it)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model, arguments.profile)
        return
    rows = measure(arguments)
    columns = list(rows[0])
    print("  ".join(f"{name:>21}" for name in columns))
    for row in rows:
        print("  ".join(f"{row[name]:>21}" for name in columns))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "benchmark": "http_front",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": machine(),
        "python": platform.python_version(),
        "answer_tokens": ANSWER_TOKENS,
        "tokenizer": Path(arguments.model).stem if arguments.model else "bytes",
        "results": rows,
    }
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
