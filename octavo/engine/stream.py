"""The outputs of a request as they reach its reader, merged while the reader is busy. On one event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from octavo.batch import LogprobColumns
from octavo.errors import OctavoError
from octavo.request import BeamScore, Request, TokenOutput


@dataclass(slots=True)
class Arrived:
    """What has come for one request since its reader last looked."""

    tokens: list[TokenOutput] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, LogprobColumns]] = field(default_factory=list)
    beam_scores: list[BeamScore] = field(default_factory=list)
    queue_seconds: float | None = None  # set once, when the request was admitted
    cached_tokens: int = 0


class Wake:
    """Wakes the one reader of one or more streams."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._ready: dict[Stream, None] = {}

    def call(self, stream: "Stream") -> None:
        """`stream` has something for the reader."""
        self._ready[stream] = None
        self._event.set()

    async def wait(self) -> "list[Stream]":
        """The streams that called since the last time, at least one."""
        await self._event.wait()
        self._event.clear()
        ready, self._ready = list(self._ready), {}
        return ready


class Stream:
    """The outputs of one request, in pieces; ends when all its sequences have.

    `open` holds the indices of the sequences that have not ended; `first_token` is when the first token came, in
    seconds of `time.monotonic`. With `whole` the reader is woken only at the end, or by an error. A reader of several
    streams gives them one `wake`, and takes from each that calls by `collect`.
    """

    def __init__(self, request: Request, whole: bool = False, wake: Wake | None = None):
        self.request = request
        self.started = False
        self.open = set(range(request.params.n))
        self.first_token: float | None = None
        self._whole = whole
        self._arrived: Arrived | None = None
        self._error: OctavoError | None = None
        self._wake = wake or Wake()

    def pending(self) -> Arrived:
        """Where the next piece gathers; the reader is woken."""
        if self._arrived is None:
            self._arrived = Arrived()
        if not self._whole:
            self._wake.call(self)
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
            self._wake.call(self)
        return not self.open

    def fail(self, error: OctavoError) -> None:
        """Ends the stream; the reader gets `error` after what has come."""
        self._error = error
        self._wake.call(self)

    def collect(self) -> Arrived | None:
        """What has come since the last time, or None; raises the error that ended the stream after its last piece."""
        arrived, self._arrived = self._arrived, None
        if arrived is None and self._error is not None:
            raise self._error
        return arrived

    async def __aiter__(self) -> AsyncIterator[Arrived]:
        while True:
            await self._wake.wait()
            # Again and again: more may come, even the end, while the reader is busy with a piece.
            while (arrived := self.collect()) is not None:
                yield arrived
            if not self.open:
                return
