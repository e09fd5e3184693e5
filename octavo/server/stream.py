"""How an answer travels: as server-sent events while it is made, or as one JSON object when it is done.

Nothing is sent before the first piece, so that an early failure still has its status. A client that goes away ends
its request in either form. What the JSON says is `chat`'s and `completions`' business.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.log import logger
from octavo.request import CompletionOutput
from octavo.server.answer import Answer
from octavo.server.failure import ClientGoneError, failure_of
from octavo.server.model import TextDelta

Json = dict[str, Any]

# Made once: `json.dumps` with options makes a new encoder for each call.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not hold pieces back
]


class Reply(Protocol):
    """An answer in the shapes of one endpoint."""

    answer: Answer
    include_usage: bool

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
    return _encode(value).encode()


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


async def whole_response(reply: Reply, receive: Receive) -> Response:
    """Collects the stream and answers with one object."""
    async with _open(reply.answer, receive):
        async for _ in reply.answer.deltas():
            pass
    return json_response(reply.whole())


class StreamedResponse(Response):
    """Sends an answer piece by piece."""

    def __init__(self, reply: Reply):
        super().__init__(media_type="text/event-stream")
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with _open(self._reply.answer, receive):
            try:
                async for events in self._events():
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                last = _DONE
            except ClientGoneError:
                raise
            except Exception as error:
                if not started:
                    raise
                if not isinstance(error, OctavoError):
                    logger.exception("an unexpected error ended a stream")
                last = b"data: " + failure_of(error).body() + b"\n\n"
        await send({"type": "http.response.body", "body": last})

    async def _events(self) -> AsyncIterator[bytes]:
        """Chunks as server-sent events, those of one piece together."""
        reply = self._reply
        # The envelope is the same each time: encoded once, cut open where the choices go.
        head = "data: " + _encode(reply.envelope())[:-1] + ',"choices":['
        tail = '],"usage":null}\n\n' if reply.include_usage else "]}\n\n"
        async for deltas in reply.answer.deltas():
            if events := [head + _encode(choice) + tail for choice in reply.choices(deltas)]:
                yield "".join(events).encode()
        if reply.include_usage:
            usage = _encode(usage_json(reply.answer))
            yield f'{head}],"usage":{usage}}}\n\n'.encode()


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
