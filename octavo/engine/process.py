"""The one process boundary: `EngineClient` in the HTTP process, `run_engine` in the engine process, a pipe between.

Plain values cross: requests one way, one message a step the other way. The client wakes each request's reader at most
once a step and hands it all that has come since, so a reader that lags gets merged pieces instead of a longer queue.
Nothing polls: the engine sleeps while it has no work, and a dead engine shows as the pipe's end. No torch here.
"""

import asyncio
import atexit
import contextlib
import gc
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from octavo import errors, log
from octavo.config import EngineOptions
from octavo.engine.limits import Limits
from octavo.engine.report import Report
from octavo.engine.state import StepOutput
from octavo.errors import EngineDeadError, OctavoError, QueueFullError
from octavo.metrics import EngineStats
from octavo.request import BeamScore, Request, TokenLogprobs, TokenOutput
from octavo.timeline import Timeline, process_age


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself when it is ready. `timeline` holds (phase, seconds) of the start."""

    limits: Limits
    device: str
    dtype: str
    plan: list[str]
    timeline: Timeline


@dataclass(slots=True)
class Arrived:
    """What has come for one request since its reader last looked."""

    tokens: list[TokenOutput] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = field(default_factory=list)
    beam_scores: list[BeamScore] = field(default_factory=list)
    queue_seconds: float | None = None  # set once, when the request was admitted
    cached_tokens: int = 0


class Stream:
    """The outputs of one request, in pieces; ends when all its sequences have.

    `open` holds the indices of the sequences that have not ended; `first_token` is when the first token came, in
    seconds of `time.monotonic`. With `whole` the reader is woken only at the end, or by an error.
    """

    def __init__(self, request: Request, whole: bool = False):
        self.request = request
        self.started = False
        self.open = set(range(request.params.n))
        self.first_token: float | None = None
        self._whole = whole
        self._arrived: Arrived | None = None
        self._error: OctavoError | None = None
        self._wake = asyncio.Event()

    def pending(self) -> Arrived:
        """Where the next piece gathers; the reader is woken."""
        if self._arrived is None:
            self._arrived = Arrived()
        if not self._whole:
            self._wake.set()
        return self._arrived

    def take(self, token: TokenOutput) -> bool:
        """Gathers `token`, unless its sequence has ended here already; True if it ends the last sequence."""
        if token[1] not in self.open:
            return False
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.pending().tokens.append(token)
        return token[3] is not None and self.end_sequence(token[1])

    def end_sequence(self, index: int) -> bool:
        """Notes that sequence `index` has ended; True if it was the last."""
        self.open.discard(index)
        if not self.open:
            self._wake.set()
        return not self.open

    def fail(self, error: OctavoError) -> None:
        self._error = error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Arrived]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            # Again and again: more may come, even the end, while the reader is busy with a piece.
            while self._arrived is not None:
                arrived, self._arrived = self._arrived, None
                yield arrived
            if self._error is not None:
                raise self._error
            if not self.open:
                return


class EngineClient:
    """The engine as the HTTP process sees it. All methods belong to one event loop."""

    def __init__(self, options: EngineOptions, *, max_queued_requests: int = 1024, verbose: bool = False):
        self.options = options
        self.max_queued_requests = max_queued_requests
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.on_death: Callable[[str], None] = lambda reason: None
        self._verbose = verbose
        self._streams: dict[str, Stream] = {}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._step_began: Any = None
        self._queued = 0
        self._last_words = ""
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._mourning: asyncio.Future[None] | None = None

    async def start(self) -> EngineInfo:
        """Starts the engine process and waits until its model is loaded; raises what went wrong there."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit the sockets
        self._connection, theirs = context.Pipe()
        self._step_began = context.RawValue("d", 0.0)
        self._last_words = ""
        arguments = (theirs, self._step_began, self.options, self._verbose)
        self._process = context.Process(target=run_engine, args=arguments, name="octavo-engine", daemon=True)
        self._process.start()
        atexit.register(self._process.kill)  # for a parent that ends without `close`
        theirs.close()
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(self._connection.fileno(), self._receive)
        self.info = await self._ready
        return self.info

    def submit(self, request: Request, *, whole: bool = False) -> Stream:
        """Queues `request`. Raises `RequestError`, `QueueFullError` or `EngineDeadError` at once if it cannot run.

        `whole`: the caller wants the stream in one piece, at its end.
        """
        if self.info is None or self._connection is None:
            raise EngineDeadError(f"the engine is not running{_because(self._last_words)}")
        self.info.limits.check(request)
        if self._queued >= self.max_queued_requests:
            raise QueueFullError(
                f"{self._queued} requests are waiting, the most that --max-queued-requests allows; try again later"
            )
        stream = self._streams[request.request_id] = Stream(request, whole)
        self._queued += 1
        self._send(("add", request))
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or its sample `index`; nothing happens if it has ended already."""
        stream = self._streams.get(request_id)
        if stream is None or (index is not None and index not in stream.open):
            return
        if index is None or stream.end_sequence(index):
            self._forget(stream)
        self._send(("abort", request_id, index))

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def trouble(self, watchdog_seconds: float) -> str | None:
        """Why the engine is not healthy, or None: it must be alive, and no step may be pending for too long."""
        if self.info is None or self._process is None or not self._process.is_alive():
            return f"the engine is not running{_because(self._last_words)}"
        began = self._step_began.value
        if began and time.monotonic() - began > watchdog_seconds:
            return f"a step has been pending for {time.monotonic() - began:.0f} s"
        return None

    async def close(self) -> None:
        """Stops the engine process; open requests end with an error."""
        if self._mourning is not None:
            self._mourning.cancel()
        self._fail_all("the server is shutting down")
        if self._connection is not None:
            self._send(("stop",))
            self._disconnect()
        if self._process is not None:
            process, self._process = self._process, None
            atexit.unregister(process.kill)
            if self.info is None:  # it is still loading, and hears nothing
                process.terminate()
            await asyncio.to_thread(process.join, 5)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)

    # ---- the pipe ---------------------------------------------------------------------------------------------

    def _send(self, message: tuple[Any, ...]) -> None:
        # A broken pipe shows on the reading side too, and is dealt with there.
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(message)

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            while self._connection is not None and self._connection.poll():
                self._take(self._connection.recv())
        except (EOFError, OSError):
            self._disconnect()
            process, self._process, self.info = self._process, None, None
            self._mourning = asyncio.ensure_future(self._mourn(process))

    def _take(self, message: tuple[Any, ...]) -> None:
        kind, *values = message
        if kind == "step":
            self.stats = values[1]
            self._deliver(values[0])
        elif kind == "ready" and self._ready is not None:
            self._ready.set_result(values[0])
        elif kind == "refused" and (stream := self._streams.get(values[0])):
            self._forget(stream)
            stream.fail(values[1])
        elif kind == "failed":
            self._last_words = values[0]
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(getattr(errors, values[1], EngineDeadError)(values[0]))

    def _deliver(self, output: StepOutput) -> None:
        for request_id, seconds, cached in output.started:
            if stream := self._streams.get(request_id):
                stream.started = True
                self._queued -= 1
                arrived = stream.pending()
                arrived.queue_seconds, arrived.cached_tokens = seconds, cached
        for request_id, start, entries in output.prompt_logprobs:
            if stream := self._streams.get(request_id):
                stream.pending().prompt_logprobs.append((start, entries))
        for scored in output.beam_scores:
            if stream := self._streams.get(scored[0]):
                stream.pending().beam_scores.append(scored)
        for token in output.tokens:
            stream = self._streams.get(token[0])
            if stream is not None and stream.take(token):
                self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.request.request_id, None) and not stream.started:
            self._queued -= 1

    async def _mourn(self, process: multiprocessing.process.BaseProcess | None) -> None:
        """The engine process has ended without being asked to."""
        if process is not None:
            atexit.unregister(process.kill)
            await asyncio.to_thread(process.join, 1)  # its pipe may close a moment before it ends
            code = process.exitcode
            if not self._last_words and code is not None and code < 0:
                self._last_words = f"killed by {signal.Signals(-code).name}"
        self._fail_all(f"the engine stopped{_because(self._last_words)}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDeadError(f"the engine stopped{_because(self._last_words)}"))
        elif self._ready is not None and not self._ready.exception():
            self.on_death(self._last_words or "no reason given")

    def _fail_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.fail(EngineDeadError(reason))

    def _disconnect(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


# ---- the engine process ---------------------------------------------------------------------------------------


def run_engine(connection: Connection, step_began: Any, options: EngineOptions, verbose: bool) -> None:
    """Main function of the engine process: loads the model, then steps while there is work and sleeps otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    log.setup(verbose, process="engine")
    inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    try:
        from octavo.engine.engine import Engine

        began = process_age()
        engine = Engine.build(options)
        engine.timeline.insert(0, ("engine process", began))
        # Who stops a process group stops the parent too, which may let requests finish first. It says when to stop,
        # and its end is the pipe's end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        connection.send(("ready", engine.info()))
        threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
        gc.collect()
        gc.freeze()
        _serve(engine, connection, inbox, step_began)
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException as error:
        if not isinstance(error, OctavoError):
            traceback.print_exc()
        text = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            connection.send(("failed", text, type(error).__name__))
        raise SystemExit(1) from None


def _read(connection: Connection, inbox: "queue.SimpleQueue[tuple[Any, ...]]") -> None:
    """Empties the pipe while a step runs, so that the parent's send never has to wait for one."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(("stop",))


def _serve(engine: Any, connection: Connection, inbox: "queue.SimpleQueue[tuple[Any, ...]]", step_began: Any) -> None:
    report = Report()
    while True:
        while not inbox.empty() or not engine.has_work():
            while inbox.empty() and engine.save_idle():
                pass
            kind, *values = inbox.get()
            if kind == "stop":
                engine.shutdown()
                return
            if kind == "abort":
                engine.abort(*values)
                if not engine.has_work():  # no step will tell that the blocks are back
                    connection.send(("step", StepOutput(tokens=[]), engine.stats()))
            elif kind == "add":
                try:
                    engine.add(values[0])
                except OctavoError as error:
                    connection.send(("refused", values[0].request_id, error))
        step_began.value = time.monotonic()
        output = engine.step()
        step_began.value = 0.0
        stats = engine.stats()
        connection.send(("step", output, stats))
        report.step(stats)
