"""How an answer travels: as server-sent events while it is made, or as one JSON object when it is done.

A stream sends nothing before its first piece, so that an early failure still has its status; but after some seconds
of silence it sends a comment, lest a proxy take it for dead. A client that goes away ends its request in either form.
What the JSON says is `chat`'s and `completions`' business, and the dialect's.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.json_line import json_line
from octavo.log import logger
from octavo.request import CompletionOutput
from octavo.server.answer import Answer
from octavo.server.dialect import Dialect
from octavo.server.failure import ClientGoneError
from octavo.server.model import TextDelta
from octavo.server.off_loop import off_loop, uncollected

Json = dict[str, Any]

_DEEPEST = 3  # an answer's object, its list of choices, a choice, its logprobs
_AT_ONCE = 10_000  # numbers, which take about 1 ms
_MANY_LOGPROBS = 5000  # which take some 5 ms to tell
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
SILENCE_SECONDS = 10.0  # proxies commonly give up after 30 or 60
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not hold pieces back
]


class Reply(Protocol):
    """An answer in the shapes of one endpoint."""

    answer: Answer
    answer_id: str
    include_usage: bool
    continuous_usage: bool

    def envelope(self) -> Json:
        """The fields that stand in each chunk, before its choices."""
        ...

    def choices(self, deltas: list[TextDelta]) -> Iterable[Json]:
        """The choices of the chunks that tell `deltas`, one a chunk."""
        ...

    def whole(self) -> Json:
        """The whole answer, once it is there."""
        ...


def json_bytes(value: Json) -> bytes:
    return json_line(value).encode()


async def long_response(make: Callable[[], Json]) -> Response:
    """What `make` makes, an answer with a great many logprobs or tokens, made and told while others use the loop."""

    def tell() -> bytes:
        with uncollected:
            return _long_line(make()).encode()

    return Response(await off_loop(tell), media_type="application/json")


def _long_line(value: Any, depth: int = 0) -> str:
    """JSON in pieces, since the encoder keeps the interpreter's lock for as long as it takes."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        pieces = (json_line(value[i : i + _AT_ONCE])[1:-1] for i in range(0, len(value), _AT_ONCE))
        return f"[{','.join(pieces)}]"
    if isinstance(value, list):
        return f"[{','.join([_long_line(item, depth + 1) for item in value])}]"
    if isinstance(value, dict) and depth <= _DEEPEST:
        items = [f"{json_line(name)}:{_long_line(item, depth + 1)}" for name, item in value.items()]
        return f"{{{','.join(items)}}}"
    return json_line(value)


def json_response(value: Json, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type="application/json")


def usage_json(answer: Answer) -> Json:
    usage = answer.usage()
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def ending_json(answer: TextDelta | CompletionOutput) -> Json:
    """How a choice ended, and the scores of one that was searched for."""
    ending: Json = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    if answer.beam_score is not None:
        ending |= {"cumulative_logprob": answer.cumulative_logprob, "beam_score": answer.beam_score}
    return ending


def whole_answer(reply: Reply, dialect: Dialect) -> Json:
    """The whole answer in a dialect, once it is there."""
    answer = reply.whole()
    return answer | {"choices": [dialect.choice(choice) for choice in answer["choices"]]}


async def whole_response(reply: Reply, dialect: Dialect, receive: Receive) -> Response:
    """Collects the stream and answers with one object."""
    async with _open(reply.answer, receive):
        async for _ in reply.answer.deltas():
            pass
    if reply.answer.num_logprobs() > _MANY_LOGPROBS:
        return await long_response(lambda: whole_answer(reply, dialect))
    return json_response(whole_answer(reply, dialect))


class StreamedResponse(Response):
    """Sends an answer piece by piece, in a dialect."""

    def __init__(self, reply: Reply, dialect: Dialect):
        super().__init__(media_type="text/event-stream")
        self._reply = reply
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send)
        async with _open(self._reply.answer, receive), wire.kept_alive():
            try:
                async for events in self._events():
                    await wire.write(events)
                last = _DONE
            except ClientGoneError:
                return  # nobody reads what would be said of it
            except Exception as error:
                if not wire.started:
                    raise
                if not isinstance(error, OctavoError):
                    logger.exception("an unexpected error ended a stream")
                last = b"data: " + self._dialect.failure(error).body() + b"\n\n"
        await wire.write(last, more=False)

    async def _events(self) -> AsyncIterator[bytes]:
        """Chunks as server-sent events, those of one piece together."""
        reply, dialect = self._reply, self._dialect
        # The envelope is the same each time: encoded once, cut open where the choices go.
        head = "data: " + json_line(dialect.chunk_envelope(reply.envelope()))[:-1] + ',"choices":['
        async for deltas in reply.answer.deltas():
            if reply.continuous_usage:
                tail = f'],"usage":{json_line(usage_json(reply.answer))}}}\n\n'
            else:
                tail = f"]{dialect.chunk_usage(reply.answer, reply.include_usage)}}}\n\n"
            if events := [head + json_line(dialect.chunk_choice(choice)) + tail for choice in reply.choices(deltas)]:
                yield "".join(events).encode()
        if reply.include_usage:
            usage = json_line(usage_json(reply.answer))
            yield f'{head}],"usage":{usage}}}\n\n'.encode()


class _Wire:
    """The response as it is sent; begun by whatever is sent first."""

    def __init__(self, send: Send):
        self.started = False
        self._send = send
        self._last = 0.0  # when something was sent, in seconds of the event loop
        self._turn = asyncio.Lock()

    async def write(self, events: bytes, more: bool = True) -> None:
        async with self._turn:
            if not self.started:
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                self.started = True
            await self._send({"type": "http.response.body", "body": events, "more_body": more})
            self._last = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Meanwhile breaks every long silence with a comment, which clients skip."""
        loop = asyncio.get_running_loop()
        self._last = loop.time()

        async def comment() -> None:
            while True:
                if (silence := loop.time() - self._last) < SILENCE_SECONDS:
                    await asyncio.sleep(SILENCE_SECONDS - silence)
                else:
                    await self.write(_KEEP_ALIVE)

        commenter = asyncio.create_task(comment())
        try:
            yield
        finally:
            commenter.cancel()


@asynccontextmanager
async def _open(answer: Answer, receive: Receive) -> AsyncIterator[None]:
    """Closes `answer` at the end, however it comes, and as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.client_gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        answer.close()
