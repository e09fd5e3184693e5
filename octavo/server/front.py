"""The front door, around the whole application: the key, the count of requests, and errors that nobody expected."""

import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.log import logger
from octavo.server.failure import Failure, RefusedError
from octavo.server.service import Service

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Front:
    """ASGI middleware. `known_paths` are the metrics' labels; whatever else a client asks for counts as `other`."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
    ):
        self._app = app
        self._service = service
        api_key = service.options.api_key
        self._key = None if api_key is None else _digest(api_key.encode())
        self._open_paths = open_paths
        self._known_paths = known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.enter()
        try:
            self._check_key(scope)
            await self._app(scope, receive, counted)
        except Exception as error:
            failure = self._service.dialect.failure(error)
            if failure.status >= 500:
                logger.exception("an unexpected error")
            if status == 0:
                await _send_failure(failure, counted)
        finally:
            self._service.leave()
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            self._service.metrics.http(scope["method"] if scope["method"] in _METHODS else "other", path, status or 499)

    def _check_key(self, scope: Scope) -> None:
        """Takes the same time whatever key is given: digests are compared, and those in constant time."""
        if self._key is None or scope["path"] in self._open_paths:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
            raise RefusedError(
                401, "a valid API key is needed: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _send_failure(failure: Failure, send: Send) -> None:
    body = failure.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
