"""Sends the grammar's requests to a real server, several at once, and says which of them it did not stand.

No answer is a 5xx, all come in time and say in one line what is wrong; a valid request is answered whole; nothing is
left behind, and the engine's process is the same at the end as at the start.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema

from octavo.server.schema import ANSWERS, components
from tests.fuzz.requests import Request, request
from tests.served import Answer, BadAnswerError, Served, read_answer, request_bytes, save_tiny_model

OPTIONS = (
    *("--max-num-seqs", "128", "--max-num-batched-tokens", "512", "--kv-cache-memory", "24MiB"),
    *("--max-queued-requests", "2048", "--drain-seconds", "5"),
)
SECONDS = 60.0  # for an answer, on a busy machine
CONNECTIONS = 8
BATCH = 64
LONGEST_MESSAGE = 2000  # characters
_EARLY = (403, 404, 405, 413, 415)  # what may be said before the body is there, after which the connection is closed
_LONG = 50_000  # bytes of an answer that is not compared with its schema
ENDS = ("stop", "length", "repetition")
_TRIES = 20  # of a request that meets a full queue


class FaultError(Exception):
    """What is wrong with an answer."""


class Outcomes:
    """Counts of what came."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.valid = 0
        self.slowest = (0.0, 0)

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        return f"{self.valid} valid ones answered; {statuses}; the slowest, {self.slowest[1]}, {self.slowest[0]:.1f} s"


# ---- one answer ---------------------------------------------------------------------------------------------------


def check(asked: Request, answer: Answer) -> str:
    """How `answer` counts; raises `FaultError` if it is none that a client should meet."""
    status = answer.status
    if status == 307 and "location" in answer.headers and asked.what.startswith("HTTP"):
        return str(status)  # from a path with a slash at its end to the one without
    if status >= 500 or status < 200 or 300 <= status < 400:
        raise FaultError(f"status {status}: {answer.body[:500]!r}")
    if not answer.ended:
        raise FaultError(f"the answer, {status}, broke off after {len(answer.body)} bytes")
    if asked.method == "HEAD":
        return str(status)
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _check_events(asked, answer)
    if status >= 400:
        _check_error(_json(answer.body))
        _check_shape(asked, answer)
        if asked.valid and status != 429:
            raise FaultError(f"a valid request is refused with {status}: {answer.body[:500]!r}")
        return str(status)
    if asked.method == "POST" and "completions" in asked.path:
        _check_choices(asked, _json(answer.body))
    _check_shape(asked, answer)
    return str(status)


def _json(text: bytes) -> Any:
    def refuse(name: str) -> Any:
        raise FaultError(f"the answer holds {name}, which is not JSON: {text[:500]!r}")

    try:
        return json.loads(text.decode(), parse_constant=refuse)
    except ValueError:
        raise FaultError(f"the answer is not JSON: {text[:500]!r}") from None


def _check_shape(asked: Request, answer: Answer) -> None:
    """An answer to a known path is what /openapi.json says."""
    if asked.method != "POST" or asked.path not in ANSWERS or len(answer.body) > _LONG or not answer.body:
        return
    kind = "Error" if answer.status >= 400 else ANSWERS[asked.path][0].__name__
    try:
        _validator(kind).validate(_json(answer.body))
    except jsonschema.ValidationError as error:
        raise FaultError(f"the answer is no {kind} of /openapi.json: {error.message[:500]}") from None


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{kind}", "components": {"schemas": components()}}
    return jsonschema.Draft202012Validator(schema)


def _check_error(value: Any) -> Any:
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
        raise FaultError(f"the answer is no error of OpenAI's shape: {str(value)[:500]}")
    message = error["message"]
    if not isinstance(message, str) or not message or not message.isprintable():
        raise FaultError(f"the error's message is not one line: {message[:500]!r}")
    if max(len(message), len(error["param"] or ""), len(error["code"] or "")) > LONGEST_MESSAGE:
        raise FaultError(f"the error has {len(message)} characters: {message[:500]!r}")
    return error


def _check_choices(asked: Request, value: Any) -> None:
    choices = value.get("choices")
    if not choices:
        raise FaultError(f"the answer has no choices: {str(value)[:500]}")
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise FaultError(f"the choices' numbers are {[choice['index'] for choice in choices]}")
    for choice in choices:
        if choice["finish_reason"] not in ENDS:
            raise FaultError(f"a choice ended with {choice['finish_reason']!r}")
    _check_number(asked, len(choices))


def _check_number(asked: Request, number: int) -> None:
    prompt = asked.body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if asked.valid and number != prompts * (asked.body.get("n") or 1):
        raise FaultError(f"{number} choices came")


def _check_events(asked: Request, answer: Answer) -> str:
    events = [event for event in answer.body.split(b"\n\n") if event and not event.startswith(b":")]
    if any(not event.startswith(b"data: ") for event in events):
        raise FaultError(f"the stream holds what is no event: {answer.body[:500]!r}")
    ended: dict[int, str] = {}
    for event in events[:-1]:
        for choice in _json(event[6:])["choices"]:
            if choice["finish_reason"] is not None:
                ended[choice["index"]] = choice["finish_reason"]
            else:
                ended.setdefault(choice["index"], "nothing")
    if not events:
        raise FaultError("the stream is empty")
    if events[-1] != b"data: [DONE]":
        error = _check_error(_json(events[-1][6:]))
        if asked.valid or error["type"] != "invalid_request_error":
            raise FaultError(f"the stream ended with {error}")
        return "200 with an error"
    if not ended or any(reason not in ENDS for reason in ended.values()):
        raise FaultError(f"the stream's choices ended with {ended}")
    _check_number(asked, len(ended))
    return "200"


# ---- one request --------------------------------------------------------------------------------------------------


async def send(port: int, asked: Request) -> tuple[str, list[Answer]]:
    """Sends `asked` on a connection of its own; how it counts, and what came. Raises `FaultError`."""
    answers: list[Answer] = []
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return await _exchange(reader, writer, asked, answers), answers
            finally:
                writer.close()
    except TimeoutError:
        raise FaultError(f"no answer within {SECONDS:g} s") from None
    except BadAnswerError as error:
        raise FaultError(str(error)) from None


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Request, answers: list[Answer]
) -> str:
    writing = asyncio.create_task(_write(writer, asked.pieces))
    try:
        if asked.leaves_after is not None:
            await writing
            if asked.leaves_after:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    await reader.readexactly(asked.leaves_after)
            return "left"
        for number in range(asked.num_answers):
            answer = await read_answer(reader, asked.method)
            if answer is None:
                if asked.alone or number:
                    return "closed"
                raise FaultError("the connection was closed without an answer")
            answers.append(answer)
            counted = check(asked, answer)
        early = not writing.done()
    finally:
        writing.cancel()
    last = answers[-1]
    if asked.alone or early or last.status in _EARLY or last.headers.get("connection", "").lower() == "close":
        return counted
    # The connection must be of use to the next request.
    writer.write(request_bytes("GET", "/version"))
    following = await read_answer(reader)
    if following is None or following.status != 200:
        raise FaultError(f"the next request on the connection got {following}")
    return counted


async def _write(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.002)


# ---- all of them --------------------------------------------------------------------------------------------------


class Fuzz:
    """Requests of one seed on their way to one server."""

    def __init__(self, server: Served, seed: int, tell: Callable[[str], None] = print):
        self.outcomes = Outcomes()
        self._server = server
        self._seed = seed
        self._tell = tell
        self._engine = server.engine_pid
        self._logged = 0

    async def run(self, numbers: range, until: float = float("inf")) -> None:
        """Sends the requests of these numbers; begins no more at `until`, in seconds of `time.monotonic`."""
        for batch in (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)):
            waiting = iter(batch)
            await asyncio.gather(*(self._connection(waiting) for _ in range(CONNECTIONS)))
            await self._look(f"{batch[0]} to {batch[-1]}")
            if time.monotonic() > until:
                break

    async def _connection(self, waiting: Iterator[int]) -> None:
        for number in waiting:
            await self._ask(request(self._seed, number))

    async def _ask(self, asked: Request) -> None:
        began = time.monotonic()
        try:
            for _ in range(_TRIES):
                counted, _ = await send(self._server.port, asked)
                if counted != "429" or not asked.valid:
                    break
                await asyncio.sleep(0.5)
            else:
                raise FaultError("the queue stayed full")
            self.outcomes.statuses[counted] += 1
            self.outcomes.valid += counted == "200" and asked.path in ("/v1/completions", "/v1/chat/completions")
        except (FaultError, OSError) as error:
            self._fault(asked.number, f"{asked.path}, {asked.what}: {error}")
        self.outcomes.slowest = max(self.outcomes.slowest, (time.monotonic() - began, asked.number))

    async def _look(self, numbers: str) -> None:
        """What the server is like after these requests."""
        health = await self._server.get("/health", SECONDS)
        if health.status != 200:
            self._fault(None, f"after requests {numbers}: /health is {health.status}, {health.body[:200]!r}")
        if (engine := self._server.engine_pid) != self._engine:
            self._fault(None, f"among requests {numbers} is one that ended the engine")
            self._engine = engine
        if left := await self._server.until_idle(SECONDS):
            self._fault(None, f"after requests {numbers} there is still {left}")
        said = self._server.log.read_text(errors="replace")[self._logged :]
        self._logged += len(said)
        if "Traceback" in said:
            self._fault(None, f"among requests {numbers} is one with a traceback in the log:\n{said[-3000:]}")

    def _fault(self, number: int | None, what: str) -> None:
        self.outcomes.faults.append(what)
        repeat = "" if number is None else f"\n    scripts/fuzz requests --seed {self._seed} --only {number}"
        self._tell(f"{what}{repeat}")


def run(arguments: argparse.Namespace) -> int:
    """`scripts/fuzz requests`; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        server = Served(save_tiny_model(path), path / "log", *OPTIONS)
        try:
            if arguments.only is not None:
                return asyncio.run(_show(server, arguments.seed, arguments.only))
            return _run_all(server, arguments)
        finally:
            server.kill()


def _run_all(server: Served, arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    fuzz = Fuzz(server, arguments.seed, lambda text: print(text, flush=True))
    until = began + arguments.seconds if arguments.seconds is not None else float("inf")
    asyncio.run(fuzz.run(range(arguments.first, arguments.first + arguments.requests), until))
    faults = fuzz.outcomes.faults
    if code := server.stop():
        faults.append(f"the server ended with {code}")
        print(faults[-1])
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s: {len(faults)} faults; {fuzz.outcomes}")
    return 1 if faults else 0


async def _show(server: Served, seed: int, number: int) -> int:
    """One request alone, and what comes of it."""
    asked = request(seed, number)
    print(f"{asked.path}, {asked.what}, {'valid' if asked.valid else 'perhaps not valid'}")
    for piece in asked.pieces:
        print(f"  sent {len(piece)} bytes: {piece[:2000]!r}")
    fuzz = Fuzz(server, seed)
    try:
        counted, answers = await send(server.port, asked)
        print(f"{counted}: {[(answer.status, answer.body[:2000]) for answer in answers]}")
    except (FaultError, OSError) as error:
        fuzz._fault(None, str(error))
    await fuzz._look(str(number))
    return 1 if fuzz.outcomes.faults else 0


def add_to(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `requests` to the kinds of `scripts/fuzz`."""
    parser = kinds.add_parser("requests", help="requests to a real server, valid and not")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="how many (default: 10000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one (default: 0)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument("--only", type=int, metavar="N", help="the request N alone, with what comes of it")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after so long")
    parser.set_defaults(run=run)
