"""The engine as the HTTP process sees it: `EngineClient` starts the engine process and talks to it over a channel.

Requests go one way, one message a step comes the other way. The engine confirms each request that it has received;
what it does not confirm in time is refused, so nothing that was sent is lost in silence. Readers are woken at most once
a step and get all that has come since. Nothing polls: a dead engine shows as the channel's end. No torch here.
"""

import asyncio
import atexit
import itertools
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octavo import errors
from octavo.config import EngineOptions
from octavo.engine.channel import ClientChannel, Message, connected_pair
from octavo.engine.info import EngineInfo
from octavo.engine.state import StepOutput
from octavo.engine.stream import Stream, Wake
from octavo.errors import EngineDeadError, EngineStalledError, OctavoError, QueueFullError, RequestError
from octavo.log import Format
from octavo.metrics import EngineStats
from octavo.request import Request

# Bounds on what waits, so that no burst fills the memory: bytes on their way to the engine, of which a request may be
# the last to pass the bound, and tokens of prompts in the queue, each of which takes some 40 bytes in either process.
MAX_UNCONFIRMED_BYTES = 64 * 2**20
MAX_QUEUED_TOKENS = 2**24
CONFIRM_SECONDS = 5.0
_CLOSING_SECONDS = 5.0
# A timer that is later than this was held up with the whole event loop, and so was what the engine has said.
_LATE_SECONDS = 0.5


@dataclass(slots=True)
class _Sent:
    """A request that the engine has not confirmed; `since` is in seconds of `time.monotonic`."""

    request_id: str
    num_bytes: int
    since: float
    refused: bool = False


class EngineClient:
    """The engine process and the requests that it has. All methods belong to one event loop.

    `confirm_timeout`: seconds after which a request that the engine has not confirmed is refused.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        max_queued_requests: int = 1024,
        confirm_timeout: float = CONFIRM_SECONDS,
        verbose: bool = False,
        log_format: Format = "text",
    ):
        self.options = options
        self.max_queued_requests = max_queued_requests
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.on_death: Callable[[str], None] = lambda reason: None
        self._confirm_timeout = confirm_timeout
        self._log = (verbose, log_format)
        self._streams: dict[str, Stream] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: ClientChannel | None = None
        self._num_queued = self._queued_tokens = 0
        self._unconfirmed: deque[_Sent] = deque()
        self._unconfirmed_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._heard = 0.0  # when the engine last said something, or was given work while it had none
        self._exit_reason = ""
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._burying: asyncio.Future[None] | None = None

    async def start(self) -> EngineInfo:
        """Starts the engine process and waits until its model is loaded; raises what went wrong there."""
        self._exit_reason = ""
        ours, theirs = connected_pair()
        with theirs:
            self._process = _start_process(theirs.fileno())
        atexit.register(self._kill_process)  # for a parent that ends without `close`
        self._ready = asyncio.get_running_loop().create_future()
        # Whoever gave up waiting is told nothing more.
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._channel = await ClientChannel.open(ours, self)
        self._channel.send(("start", self.options, *self._log))
        self.info = await self._ready
        return self.info

    def check(self, request: Request) -> None:
        """Raises `RequestError` if `request` could never run, or `EngineDeadError` if nothing can."""
        if self.info is None or self._channel is None:
            raise EngineDeadError(f"the engine is not running{_because(self._exit_reason)}")
        self.info.limits.check(request)

    def submit(self, request: Request, *, whole: bool = False, wake: Wake | None = None) -> Stream:
        """Queues `request`. Raises at once if it cannot run: `RequestError`, or `QueueFullError`, `EngineStalledError`
        and `EngineDeadError`, after which it may later.

        `whole`: the caller wants the stream in one piece, at its end. `wake`: as in `Stream`.
        """
        self.check(request)
        self._check_queue(request)
        if not self._streams:
            self._heard = time.monotonic()
        stream = self._streams[request.request_id] = Stream(request, whole, wake)
        self._num_queued += 1
        self._queued_tokens += len(request.prompt_token_ids)
        num_bytes = self._send(("add", request))
        self._unconfirmed.append(_Sent(request.request_id, num_bytes, time.monotonic()))
        self._unconfirmed_bytes += num_bytes
        self._watch_confirmations()
        return stream

    def _check_queue(self, request: Request) -> None:
        if request.request_id in self._streams:
            raise RequestError(f"request_id {request.request_id[:100]!r} is that of an open request", "request_id")
        if self._unconfirmed and self._unconfirmed[0].refused:
            raise EngineStalledError(self._stalled())
        if self._num_queued >= self.max_queued_requests:
            raise QueueFullError(
                f"{self._num_queued} requests are waiting, the most that --max-queued-requests allows; try again later"
            )
        if self._num_queued and self._queued_tokens + len(request.prompt_token_ids) > MAX_QUEUED_TOKENS:
            raise QueueFullError(
                f"requests with {self._queued_tokens} tokens are waiting, and at most {MAX_QUEUED_TOKENS} may;"
                " try again later"
            )
        if self._unconfirmed_bytes > MAX_UNCONFIRMED_BYTES:
            raise QueueFullError(
                f"{self._unconfirmed_bytes} bytes of requests are on their way to the engine, and at most"
                f" {MAX_UNCONFIRMED_BYTES} may be; try again later"
            )

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or its sample `index`; nothing happens if it has ended already."""
        stream = self._streams.get(request_id)
        if stream is None or (index is not None and index not in stream.open):
            return
        if index is None or stream.end_sequence(index):
            self._forget(stream)
        self._send(("abort", request_id, index))

    async def why_dead(self) -> str:
        """Why an engine that ran has ended; waits until its process has told."""
        if self._burying is not None:
            await asyncio.wait({self._burying})
        return f"the engine stopped{_because(self._exit_reason)}"

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def trouble(self, stall_timeout: float) -> str | None:
        """Why the engine is not healthy, or None: it must be alive, and while it has work say something within
        `stall_timeout` seconds. What it has not even confirmed counts as work after it was refused, too."""
        if self._process is None or self._process.poll() is not None:
            return f"the engine is not running{_because(self._exit_reason)}"
        now = time.monotonic()
        if self._unconfirmed and now - self._unconfirmed[0].since > stall_timeout:
            return self._stalled()
        if self._streams and now - self._heard > stall_timeout:
            return f"a step has been pending for {now - self._heard:.0f} s"
        return None

    async def close(self) -> None:
        """Stops the engine process; open requests end with an error."""
        if self._burying is not None:
            self._burying.cancel()
        self._fail_all("the server is shutting down")
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.send(("stop",))
            channel.close()
        if self._process is not None:
            process, self._process = self._process, None
            atexit.unregister(self._kill_process)
            if self.info is None:  # it is still loading, and may be long about it
                process.terminate()
            if not await asyncio.to_thread(_ends, process, _CLOSING_SECONDS):
                process.kill()
                await asyncio.to_thread(process.wait)
        if channel is not None:
            channel.abort()

    # ---- the channel ------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> int:
        """Sends `message`, if there is an engine; its size in bytes."""
        return 0 if self._channel is None else self._channel.send(message)

    def receive(self, message: Message) -> None:
        """Takes in a message of the engine's."""
        kind, *values = message
        self._heard = time.monotonic()
        if kind == "step":
            self.stats = values[1]
            self._deliver(values[0])
        elif kind == "confirmed":
            self._confirm()
        elif kind == "ready" and self._ready is not None:
            self._ready.set_result(values[0])
        elif kind == "refused":
            self._fail(*values)
        elif kind == "failed":
            self._exit_reason = values[0]
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(getattr(errors, values[1], EngineDeadError)(values[0]))

    def lost(self) -> None:
        """The channel has ended without being closed here: the engine is dead, or as good as dead."""
        process, self._process, self._channel, self.info = self._process, None, None, None
        self._burying = asyncio.ensure_future(self._bury(process))

    def _deliver(self, output: StepOutput) -> None:
        for request_id, seconds, cached in output.started:
            if stream := self._streams.get(request_id):
                self._leave_queue(stream)
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
        for request_id, error in output.failed:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: OctavoError) -> None:
        if stream := self._streams.get(request_id):
            self._forget(stream)
            stream.fail(error)

    def _leave_queue(self, stream: Stream) -> None:
        if not stream.started:
            stream.started = True
            self._num_queued -= 1
            self._queued_tokens -= len(stream.request.prompt_token_ids)

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.request.request_id, None):
            self._leave_queue(stream)

    # ---- confirmations ----------------------------------------------------------------------------------------

    def _confirm(self) -> None:
        """The engine has the oldest request that it had not confirmed."""
        self._unconfirmed_bytes -= self._unconfirmed.popleft().num_bytes

    def _watch_confirmations(self) -> None:
        """Sees to it that the timer runs while a request may become due for refusal."""
        waiting = next((sent for sent in self._unconfirmed if not sent.refused), None)
        if self._timer is None and waiting is not None:
            self._set_timer(waiting.since + self._confirm_timeout - time.monotonic())

    def _set_timer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._refuse_late, time.monotonic() + seconds)

    def _refuse_late(self, due: float) -> None:
        """Refuses what the engine has not confirmed in time. `due`: when this should have been called."""
        self._timer = None
        now = time.monotonic()
        if now - due > _LATE_SECONDS:
            self._set_timer(_LATE_SECONDS)
            return
        late = itertools.takewhile(lambda sent: now - sent.since >= self._confirm_timeout, self._unconfirmed)
        for sent in [sent for sent in late if not sent.refused]:
            sent.refused = True
            if stream := self._streams.get(sent.request_id):
                self.abort(sent.request_id)
                stream.fail(EngineStalledError(self._stalled()))
        self._watch_confirmations()

    def _stalled(self) -> str:
        seconds = time.monotonic() - self._unconfirmed[0].since
        return (
            f"the engine has not confirmed a request for {seconds:.0f} s (it has {self._confirm_timeout:g} s,"
            " --confirm-timeout); try again later"
        )

    # ---- the end ----------------------------------------------------------------------------------------------

    async def _bury(self, process: "subprocess.Popen[bytes] | None") -> None:
        """The engine process has ended without being asked to."""
        if process is not None:
            atexit.unregister(self._kill_process)
            if not await asyncio.to_thread(_ends, process, 1):  # its channel may close a moment before it ends
                process.kill()
                await asyncio.to_thread(process.wait)
            if not self._exit_reason and (code := process.returncode):
                name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
                self._exit_reason = name
        self._fail_all(f"the engine stopped{_because(self._exit_reason)}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDeadError(f"the engine stopped{_because(self._exit_reason)}"))
        elif self._ready is not None and not self._ready.cancelled() and not self._ready.exception():
            self.on_death(self._exit_reason or "no reason given")

    def _kill_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _fail_all(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unconfirmed.clear()
        self._unconfirmed_bytes = 0
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.fail(EngineDeadError(reason))


def _start_process(descriptor: int) -> "subprocess.Popen[bytes]":
    """The engine process on its end of the channel. It is no `multiprocessing` child, which would import the caller's
    script once more, and fail where that has no main guard."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    return subprocess.Popen(
        [os.fsdecode(multiprocessing.spawn.get_executable()), "-P", "-m", "octavo.engine", str(descriptor)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def _ends(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Waits for the process to end, at most for so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
