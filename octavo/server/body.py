"""Requests' bodies: read under bounds, for each and for all at once, and parsed without holding up the event loop."""

import asyncio
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from octavo.errors import QueueFullError, short
from octavo.server.failure import ClientGoneError, RefusedError
from octavo.server.off_loop import off_loop, uncollected
from octavo.server.protocol import parse

_SHORT = 64 * 1024  # bytes that are parsed in at most 2 ms
AT_ONCE = 64  # of the largest bodies
# Parsing holds the interpreter's lock, and its time goes by what a body holds more than by its bytes: 4 MiB of text
# take 3 ms, of token ids 150 ms, of empty lists 500 ms. So a body may hold a value, a named value, and a list or object
# in so many bytes of the largest size.
_BOUNDS = ((16, "values", (b",",)), (32, "named values", (b'":',)), (64, "lists and objects", (b"[", b"{")))


def _parse_large(kind: type[Any], body: bytes) -> Any:
    with uncollected:
        return parse(kind, body)


class Bodies:
    """Bodies of at most `limit` bytes each, and `AT_ONCE` times as many among those being read and parsed."""

    def __init__(self, limit: int):
        self._limit = limit
        self._held = 0  # bytes
        self._parsing = asyncio.Lock()

    async def parsed(self, request: Request, kind: type[Any]) -> Any:
        """`request`'s body as a `kind`; raises `RequestError`, `RefusedError` (413, 415) and `QueueFullError`."""
        taken = 0
        try:
            chunks = []
            self._check_head(request)
            async for chunk in request.stream():
                taken += len(chunk)
                self._held += len(chunk)
                if taken > self._limit:
                    raise self._too_large()
                if self._held > AT_ONCE * self._limit:
                    raise QueueFullError(
                        f"{self._held} bytes of requests are being read, the most that this server reads at once"
                        f" ({AT_ONCE} times --max-body-bytes); try again"
                    )
                chunks.append(chunk)
            body = b"".join(chunks)
            if len(body) <= _SHORT:
                return parse(kind, body)
            for size, what, marks in _BOUNDS:
                if (found := sum(map(body.count, marks))) > (most := self._limit // size):
                    raise RefusedError(
                        413,
                        f"the body holds about {found} {what}, and this server takes {most} at once (a {size}th of"
                        " --max-body-bytes); send less at once",
                        code="body_too_large",
                    )
            # One after the other: the event loop waits for the lock's holder, and not for a queue of them.
            async with self._parsing:
                return await off_loop(_parse_large, kind, body)
        except ClientDisconnect:
            raise ClientGoneError from None
        finally:
            self._held -= taken

    def _check_head(self, request: Request) -> None:
        """Refuses what says itself that it is no plain JSON or too large, before it is read."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            # A page in a browser may send other types to any server (see `access`).
            raise RefusedError(
                415,
                f"the body's content type is {short(kind)}; send JSON with the header Content-Type: application/json",
                code="unsupported_media_type",
            )
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", ""):
            raise RefusedError(
                415,
                f"the body's content encoding is {short(coding)}; send it as it is, without Content-Encoding",
                code="unsupported_media_type",
            )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"the body is larger than {self._limit} bytes, the most that this server takes (--max-body-bytes)",
            code="body_too_large",
        )
