"""Requests' bodies: read under bounds, for each and for all at once, and parsed without holding up the event loop."""

from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from octavo.errors import QueueFullError
from octavo.server.failure import ClientGoneError, RefusedError
from octavo.server.off_loop import off_loop
from octavo.server.protocol import parse

_SHORT = 64 * 1024  # bytes that are parsed in at most 2 ms
_BYTES_OF_A_VALUE = 6  # as of a token id with its comma
AT_ONCE = 64  # of the largest bodies


class Bodies:
    """Bodies of at most `limit` bytes each, and `AT_ONCE` times as many among those being read and parsed."""

    def __init__(self, limit: int):
        self._limit = limit
        self._held = 0  # bytes

    async def parsed(self, request: Request, kind: type[Any]) -> Any:
        """`request`'s body as a `kind`; raises `RequestError`, `RefusedError` (413) and `QueueFullError`."""
        taken = 0
        try:
            chunks = []
            self._check_size(request)
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
            # Parsing holds the interpreter's lock, and takes its time by values as much as by bytes.
            if body.count(b",") > (most := self._limit // _BYTES_OF_A_VALUE):
                raise RefusedError(
                    413,
                    f"the body holds more than {most} values, the most that this server takes (a"
                    f" {_BYTES_OF_A_VALUE}th of --max-body-bytes)",
                    code="body_too_large",
                )
            return await off_loop(parse, kind, body)
        except ClientDisconnect:
            raise ClientGoneError from None
        finally:
            self._held -= taken

    def _check_size(self, request: Request) -> None:
        """Refuses what says itself that it is too large, before it is read."""
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"the body is larger than {self._limit} bytes, the most that this server takes (--max-body-bytes)",
            code="body_too_large",
        )
