"""One client's connection: uvicorn's, with bounds on what a client may make it wait for and keep.

A head (request line and headers) has a size and a time, a body a time, and a client that stops reading its answer is
cut off. All of that holds before the application, and so before the key, sees the request.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 15.0  # from a request's first byte, or a new connection's start, to the end of its headers
BODY_SECONDS = 60.0  # from there to the end of its body
UNREAD_SECONDS = 30.0  # for a client to read on, once it has left 64 KiB of its answer unread
LINGER_SECONDS = 5.0  # for a client to send the rest of a body after its answer, which it may read only then


class Connection(HttpToolsProtocol):
    """Refuses a request by an answer of its own, and a client that does not even read by closing the connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._in_head, self._in_body = True, False
        self._head_bytes = 0
        self._closing = False  # once a body that nobody wants has come
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    # ---- the transport's calls --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._allow(HEAD_SECONDS, 408, "the headers did not come in time")

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear(self._deadline)
        self._clear(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if not self._head_bytes and self._deadline is None:  # the next request of a connection that was kept open
                self._allow(HEAD_SECONDS, 408, "the headers did not come in time")
            self._head_bytes += len(data)
        super().data_received(data)
        # What was received with the end of the headers may be the body's.
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes, the most that this server takes")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._clear(self._unread)

    # ---- the parser's calls -----------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._allow(BODY_SECONDS, 408, "the body did not come in time")
        super().on_headers_complete()
        self.cycle.transport = _Lingering(self.transport, self)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        self._in_head, self._in_body = True, False
        self._clear(self._deadline)
        self._deadline = None
        super().on_message_complete()
        if self._closing:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.linger()

    def linger(self) -> None:
        """After an answer that came before the end of its request's body: what still comes is thrown away for a moment,
        and nothing follows. A client that sends all before it reads would else have its connection reset, and no
        answer."""
        if self._in_body and not self.transport.is_closing():
            self._clear(self._deadline)
            self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def close(self) -> None:
        """Closes, if the request's body has come, else when it has or nobody waits for it any more."""
        if not self._in_body:
            self.transport.close()
        else:
            self._closing = True
            self.linger()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "the request is not valid HTTP/1.1; send it anew, on another connection")

    # ---- bounds -----------------------------------------------------------------------------------------------

    def _allow(self, seconds: float, status: int, reason: str) -> None:
        """Lets the client take so long until the next part of its request is there."""
        self._clear(self._deadline)
        self._deadline = self.loop.call_later(seconds, self._refuse, status, f"{reason} ({seconds:g} s)")

    @staticmethod
    def _clear(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def _refuse(self, status: int, reason: str) -> None:
        """Ends the connection, with an answer if nothing else was being answered."""
        if self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        begun = self._head_bytes or self._in_body or status == 400
        if begun and not answered:
            error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, _PHRASES[status], len(body), body)
            )
        self.transport.close()


class _Lingering:
    """The transport as uvicorn's answer to a request knows it, which closes it as soon as it is written."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = connection.close


_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}
