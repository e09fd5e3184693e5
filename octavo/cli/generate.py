"""`octavo generate`: answers a file of prompts, one JSON value a line, into a file of answers.

Lines of our own form and of OpenAI's batch files may be mixed; the latter are answered as the server answers their
bodies. A run that was interrupted goes on where it stopped (`answers_file`).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from octavo.cli.answers_file import AnswersFile, batch_id, digest_of
from octavo.cli.options import add_options, from_args
from octavo.cli.sampling import SamplingOptions
from octavo.config import EngineOptions, ServerOptions
from octavo.errors import ConfigError, EngineDeadError, OctavoError, QueueFullError, RequestError, short
from octavo.sampling_defaults import sampling_params
from octavo.sampling_params import SamplingParams

_READ_AHEAD = 1000  # lines of a pipe
_FULL_SECONDS = 0.05  # until a full queue is tried again
_SERVER_OPTIONS = ("served_model_name", "max_queued_requests")
_URLS = "/v1/chat/completions or /v1/completions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    wanted = (
        'lines of {"prompt": ...} or {"messages": [...]}, each with sampling parameters of its own if wanted, or of'
        " OpenAI's batch files; - reads standard input"
    )
    parser.add_argument("-i", "--input", required=True, metavar="FILE", help=wanted)
    told = "answers, one JSON object a line; an interrupted run goes on; - writes standard output"
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=told)
    add_options(parser, SamplingOptions, "answers")
    add_options(parser, EngineOptions, "model and engine")
    add_options(parser, ServerOptions, "requests", only=_SERVER_OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    options, server_options = from_args(EngineOptions, arguments), from_args(ServerOptions, arguments)
    given = from_args(SamplingOptions, arguments).given()
    sampling_params({}, given)  # a mistake among them is no line's
    with _opened(arguments.input) as lines:
        _check_different(lines, arguments.output)
        answers = AnswersFile(arguments.output)
        try:
            total = None
            if _is_file(lines):
                total = sum(1 for line in lines if line.strip())
                lines.seek(0)
                answers.check(arguments.input, lines)
                lines.seek(0)
            elif answers.done:
                raise ConfigError(
                    f"{arguments.output} has answers already, and standard input cannot be compared with them; name"
                    " another output"
                )
            job = _Job(answers, given, total)
            if total == len(answers.done):
                return job.tell()
            return asyncio.run(job.run(lines, options, server_options, verbose=arguments.verbose))
        finally:
            answers.close()


def _is_file(lines: IO[bytes]) -> bool:
    """Whether all of the input can be read more than once; of a file that somebody has read a part of the rest alone
    is meant."""
    return lines.seekable() and lines.tell() == 0


def _check_different(lines: IO[bytes], output: str) -> None:
    with contextlib.suppress(OSError):
        there = os.stat(output)  # noqa: PTH116 -- a name of any kind
        if stat.S_ISREG(there.st_mode) and os.path.samestat(os.fstat(lines.fileno()), there):
            raise ConfigError(f"{output} is the input as well as the output; name another output")


def _opened(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        if os.path.isdir(name):  # noqa: PTH112 -- a name of any kind
            raise ConfigError(f"input {name} is a folder; name a file of JSON lines")
        return open(name, "rb")  # noqa: PTH123 -- the caller closes it
    except OSError as error:
        raise ConfigError(f"input {name} cannot be read: {error.strerror}; name a file of JSON lines") from None


@dataclass(slots=True)
class _Task:
    """A line that is being answered. `name` is its own `id`; `custom_id` is there if it is a batch file's."""

    number: int
    digest: str
    name: Any = None
    custom_id: str | None = None


class _Job:
    """One run over one input."""

    def __init__(self, answers: AnswersFile, given: dict[str, Any], total: int | None):
        self.answers, self.given, self.total = answers, given, total
        self.answered = self.bad = self.tokens = 0
        self._custom_ids: dict[str, int] = {}  # the line of each
        self._service: Any = None
        self._advance: Callable[[], None] = lambda: None

    async def run(
        self, lines: IO[bytes], options: EngineOptions, server_options: ServerOptions, *, verbose: bool
    ) -> int:
        """Answers every line; 0, or 1 if some were bad."""
        from octavo.checkpoint import open_engine_checkpoint
        from octavo.engine.process import EngineClient
        from octavo.models import check_runnable
        from octavo.server.metrics import Metrics
        from octavo.server.model import load_model
        from octavo.server.service import Service

        # Fetches a model that is not here yet, before two processes look for it.
        open_engine_checkpoint(options, check_runnable)
        options.warm_up = options.warm_up or "none"  # nobody waits for a single answer
        engine = EngineClient(
            options,
            max_queued_requests=server_options.max_queued_requests,
            confirm_timeout=math.inf,  # nobody else is kept waiting
            verbose=verbose,
        )
        self._service = Service(engine, server_options, Metrics(lambda: engine.stats))
        starting = asyncio.ensure_future(engine.start())
        try:
            self._service.model = await asyncio.to_thread(load_model, options, server_options)
            limits = (await starting).limits
            try:
                with self._progress():
                    await self._answer_all(_numbered(lines), 2 * limits.max_num_seqs)
            except EngineDeadError:
                goes_on = self.answers.name != "-" and self.total is not None
                ending = "; the same command goes on where it stopped" if goes_on else ""
                raise EngineDeadError(f"{await engine.why_dead()}{ending}") from None
        finally:
            starting.cancel()
            await engine.close()
        return self.tell()

    def tell(self) -> int:
        """Says what has come of the lines; 0, or 1 if some were bad."""
        bad = self.bad + self.answers.num_refused
        there = len(self.answers.done) - self.answers.num_refused
        print(f"{self.answered} answered, {there} already there, {bad} bad lines", file=sys.stderr)
        return 1 if bad else 0

    async def _answer_all(self, lines: AsyncIterator[tuple[int, bytes]], most: int) -> None:
        """At most `most` lines at a time, each as a task of its own."""
        open_tasks: set[asyncio.Task[None]] = set()
        try:
            while (found := await _next(lines, open_tasks)) is not None:
                (number, line), open_tasks = found
                if number in self.answers.done:
                    self._note_custom_id(number, line)
                    continue
                if not line.strip():
                    continue
                if len(open_tasks) >= most:
                    open_tasks = await _settled(open_tasks, asyncio.FIRST_COMPLETED)
                open_tasks.add(asyncio.create_task(self._answer(_Task(number, digest_of(line)), line)))
                await asyncio.sleep(0)  # lines enter in their order
            while open_tasks:
                open_tasks = await _settled(open_tasks, asyncio.FIRST_COMPLETED)
        finally:
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)

    async def _answer(self, task: _Task, line: bytes) -> None:
        try:
            value = _read(task, line)
            if "custom_id" in value or "body" in value:
                await self._answer_batch_line(task, value)
            else:
                await self._answer_line(task, value)
        except EngineDeadError:
            raise
        except (OctavoError, ValueError, RecursionError) as error:
            self._report(task, error)
        self._advance()

    # ---- lines of our own ----------------------------------------------------------------------------------------

    async def _answer_line(self, task: _Task, value: dict[str, Any]) -> None:
        from octavo.llm import read_prompt
        from octavo.text.chat_template import encode_chat

        if ("prompt" in value) == ("messages" in value):
            raise RequestError('a line is {"prompt": ...} or {"messages": [...]}, or a text')
        model = self._service.model
        task.name = value.pop("id", None)
        if "messages" in value:
            prompt = encode_chat(model.tokenizer, value.pop("messages"))
        else:
            prompt = value.pop("prompt")
        SamplingParams.check_names(value)
        for field in ("logprobs", "prompt_logprobs"):
            if value.get(field) is not None:
                raise RequestError(
                    f"{field} is given, but an answer to a line like this has none; use a line of OpenAI's batch files",
                    field,
                )
        params = sampling_params(model.sampling_defaults, self.given | value)
        text = read_prompt(f"line-{task.number}", prompt, params, model.tokenizer)
        answer = await self._until_taken(lambda: self._service.answer([text.request], [text.prompt], True))
        async with contextlib.aclosing(answer.deltas()) as deltas:
            async for _ in deltas:
                pass
        (output,) = answer.results()
        self._count(answer)
        told: dict[str, Any] = {"line": task.number, "digest": task.digest}
        if task.name is not None:
            told["id"] = task.name
        told |= {"text": output.outputs[0].text, "finish_reason": output.outputs[0].finish_reason}
        if len(output.outputs) > 1:
            told["texts"] = [sample.text for sample in output.outputs]
        usage = answer.usage()
        self._write(told | {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion})

    # ---- lines of OpenAI's batch files ---------------------------------------------------------------------------

    async def _answer_batch_line(self, task: _Task, value: dict[str, Any]) -> None:
        from octavo.server.failure import failure_of

        task.custom_id = value.get("custom_id") if isinstance(value.get("custom_id"), str) else None
        try:
            self._check_batch_line(task, value)
            status, body = 200, await self._answer_body(value["url"], value["body"])
        except EngineDeadError:
            raise
        except OctavoError as error:
            failure = failure_of(error)
            status, body = failure.status, json.loads(failure.body())
            self._report(task, error)
            if status >= 500:  # no fault of the line's: another run asks again
                return
        response = {"status_code": status, "request_id": batch_id(task.number, task.digest), "body": body}
        told = {"id": response["request_id"], "custom_id": task.custom_id, "response": response, "error": None}
        self._write(told, answered=status == 200)

    def _note_custom_id(self, number: int, line: bytes) -> None:
        """Of a line that an earlier run has answered."""
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            if isinstance(custom_id := json.loads(line).get("custom_id"), str):
                self._custom_ids.setdefault(custom_id, number)

    def _check_batch_line(self, task: _Task, value: dict[str, Any]) -> None:
        if task.custom_id is None:
            raise RequestError(f"custom_id is {short(value.get('custom_id'))}; it must be a text", "custom_id")
        if (first := self._custom_ids.setdefault(task.custom_id, task.number)) != task.number:
            raise RequestError(
                f"custom_id {short(task.custom_id)} is that of line {first}; give each line its own", "custom_id"
            )
        if unknown := value.keys() - {"custom_id", "method", "url", "body"}:
            raise RequestError(
                f"unknown field {short(min(unknown))}; a line of a batch file has custom_id, method, url and body",
                min(unknown)[:100],
            )
        if value.get("method", "POST") != "POST":
            raise RequestError(f"method is {short(value['method'])}; it must be POST", "method")
        if not isinstance(value.get("url"), str) or value["url"] not in _routes():
            raise RequestError(f"url is {short(value.get('url'))}; it must be {_URLS}", "url")
        if not isinstance(value.get("body"), dict):
            raise RequestError(f"body is {short(value.get('body'))}; it must be an object, the request", "body")
        if value["body"].get("stream"):
            raise RequestError("stream is true, but answers come whole into a file; leave it out", "stream")

    async def _answer_body(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        from octavo.server.protocol import parse
        from octavo.server.stream import whole_answer

        kind, start = _routes()[url]
        # Options of the command line stand in for what a body leaves out.
        given = {name: value for name, value in self.given.items() if value is not None and name not in body}
        if "max_completion_tokens" in body:
            given.pop("max_tokens", None)
        asked = parse(kind, json.dumps(given | body).encode("utf-8", "surrogatepass"))
        reply = await self._until_taken(lambda: start(self._service, asked))
        async with contextlib.aclosing(reply.answer.deltas()) as deltas:
            async for _ in deltas:
                pass
        self._count(reply.answer)
        return whole_answer(reply, self._service.dialect)

    # ---- counting and telling ------------------------------------------------------------------------------------

    async def _until_taken(self, submit: Callable[[], Any]) -> Any:
        """What `submit` gives, once the queue has room for it."""
        while True:
            try:
                return await submit()
            except QueueFullError:
                await asyncio.sleep(_FULL_SECONDS)

    def _count(self, answer: Any) -> None:
        self.tokens += answer.usage().completion

    def _report(self, task: _Task, error: Exception) -> None:
        self.bad += 1
        print(f"line {task.number}: {error}", file=sys.stderr)

    def _write(self, answer: dict[str, Any], answered: bool = True) -> None:
        self.answers.write(answer)
        self.answered += answered

    @contextlib.contextmanager
    def _progress(self) -> Iterator[None]:
        """A bar on a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[tokens]} tokens"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=self.total, completed=len(self.answers.done), tokens=0)
            self._advance = lambda: progress.update(bar, advance=1, tokens=self.tokens)
            yield


async def _next(
    lines: AsyncIterator[tuple[int, bytes]], tasks: set[asyncio.Task[None]]
) -> tuple[tuple[int, bytes], set[asyncio.Task[None]]] | None:
    """The next line, and those of `tasks` that go on; None at the end. Raises what a task has raised meanwhile."""
    coming = asyncio.ensure_future(anext(lines, None))
    try:
        while not coming.done():
            done, _ = await asyncio.wait({coming, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {coming}:
                task.result()
            tasks = tasks - done
    finally:
        coming.cancel()
    line = coming.result()
    return None if line is None else (line, tasks)


async def _numbered(lines: IO[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """Lines with their numbers from 1. Whoever writes a pipe may wait for answers before the next line, so a thread
    reads it."""
    if _is_file(lines):
        for number, line in enumerate(lines, 1):
            yield number, line
        return
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[bytes | OSError] = asyncio.Queue(_READ_AHEAD)

    def put(line: bytes | OSError) -> None:
        asyncio.run_coroutine_threadsafe(read.put(line), loop).result()

    def feed() -> None:
        # A file of its own: whoever holds the lock of sys.stdin when the interpreter ends is a fatal error.
        own = open(lines.fileno(), "rb", closefd=False)  # noqa: SIM115 -- may wait for ever
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                for line in own:
                    put(line)
                put(b"")
            except OSError as error:
                put(error)

    threading.Thread(target=feed, name="octavo-read-input", daemon=True).start()
    for number in itertools.count(1):
        found = await read.get()
        if isinstance(found, OSError):
            raise found
        if not found:
            return
        yield number, found


async def _settled(tasks: set[asyncio.Task[None]], when: str) -> set[asyncio.Task[None]]:
    """Those of `tasks` that go on; raises what another has raised."""
    done, left = await asyncio.wait(tasks, return_when=when)
    for task in done:
        task.result()
    return left


def _read(task: _Task, line: bytes) -> dict[str, Any]:
    """The object of a line, a text as its prompt."""
    text = line.decode("utf-8-sig" if task.number == 1 else "utf-8", "surrogateescape")
    value = json.loads(text)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise RequestError('a line is {"prompt": ...} or {"messages": [...]}, or a text')
    return value


def _routes() -> dict[str, tuple[type[Any], Callable[..., Any]]]:
    """What a body is, and who answers it, by url."""
    from octavo.server.chat import start_chat
    from octavo.server.completions import start_completion
    from octavo.server.protocol import ChatRequest, CompletionRequest

    return {
        "/v1/chat/completions": (ChatRequest, start_chat),
        "/v1/completions": (CompletionRequest, start_completion),
    }
