"""Errors on the wire: every exception as a status, OpenAI's error object and headers.

A client reads of its own request and of the server's state here, never of another's request or of our internals.
"""

import json
from dataclasses import dataclass, field

from octavo.errors import (
    EngineDeadError,
    EngineStalledError,
    InternalError,
    OctavoError,
    QueueFullError,
    RequestError,
)

RETRY_SECONDS = 1  # after a full queue: a slot opens with every request that ends
RESTART_SECONDS = 10  # after a dead, loading or draining server
LONGEST_MESSAGE = 1000  # characters


class RefusedError(OctavoError):
    """A request that HTTP itself refuses, with its status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ClientGoneError(OctavoError):
    """The client closed the connection; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is sent."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": _one_line(self.message), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def _one_line(message: str) -> str:
    """`message`, which may quote a client or a template, with escapes for what does not print, and cut if long."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE - 3]}..."
    if message.isprintable():
        return message
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def failure_of(error: Exception) -> Failure:
    """How `error` is told to the client."""
    match error:
        case RequestError():
            return Failure(400, str(error), "invalid_request_error", error.param)
        case QueueFullError():
            headers = {"retry-after": str(RETRY_SECONDS)}
            return Failure(429, str(error), "rate_limit_error", code="queue_full", headers=headers)
        case EngineDeadError() | EngineStalledError():
            headers = {"retry-after": str(RESTART_SECONDS)}
            return Failure(503, str(error), "server_error", code="engine_unavailable", headers=headers)
        case ClientGoneError():
            return Failure(499, str(error), "invalid_request_error")
        case RefusedError():
            return _refused(error)
        case InternalError():
            return Failure(500, str(error), "server_error", code="internal_error")
    return Failure(500, "an unexpected error in the server; its log says more", "server_error", code="internal_error")


def _refused(error: RefusedError) -> Failure:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    headers = {}
    if error.status == 503:
        headers["retry-after"] = str(RESTART_SECONDS)
    elif error.status == 401:
        headers["www-authenticate"] = "Bearer"
    elif error.status in (413, 415):
        headers["connection"] = "close"  # the rest of the body is not read
    return Failure(error.status, str(error), kind, error.param, error.code, headers)
