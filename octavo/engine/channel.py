"""Messages between the HTTP process and the engine process: whole, in order, of any size, or the connection ends.

A pair of sockets joins them. On the client's event loop asyncio's own transport writes and reads: what a socket does
not take at once waits in the transport's buffer, whose size is known, and the loop never waits. The engine's end is a
plain blocking socket. No failure is passed over on either side: it closes the connection (docs/decisions/0120).

    message   [ length of the rest, 8 bytes | pickle ]
"""

import asyncio
import pickle
import socket
import struct
import threading
from typing import Any, Protocol, cast

Message = tuple[Any, ...]

_LENGTH = struct.Struct("!Q")
_PIECE = 2**20  # bytes that the engine's end asks the socket for at once


def _encode(message: Message) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class Client(Protocol):
    """What the client's end of a channel tells its owner."""

    def receive(self, message: Message) -> None:
        """A message has come."""

    def lost(self) -> None:
        """The connection has ended, and no message will come; not called after `close`."""


class ClientChannel(asyncio.Protocol):
    """The end on an event loop."""

    def __init__(self, client: Client):
        self._client: Client | None = client
        self._transport: asyncio.WriteTransport | None = None
        self._arrived = bytearray()

    @classmethod
    async def open(cls, end: socket.socket, client: Client) -> "ClientChannel":
        """Takes over `end`, a connected Unix socket."""
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(client), sock=end)
        return channel

    def send(self, message: Message) -> int:
        """Hands `message` to the transport, which keeps what the socket does not take yet; its size in bytes.

        Once the connection is lost nothing is sent, and the owner is told by `lost`.
        """
        content = _encode(message)
        if self._transport is not None:
            self._transport.write(_LENGTH.pack(len(content)))
            self._transport.write(content)
        return len(content)

    def close(self) -> None:
        """Ends the connection when what was handed over is sent."""
        self._client = None
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection now, whatever was not sent."""
        self._client = None
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        arrived = self._arrived
        arrived += data
        start = 0
        while len(arrived) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(arrived, start)
            end = start + _LENGTH.size + length
            if len(arrived) < end:
                break
            with memoryview(arrived) as view:
                message = pickle.loads(view[start + _LENGTH.size : end])
            start = end
            if self._client is not None:
                self._client.receive(message)
        del arrived[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        client, self._client = self._client, None
        if client is not None:
            client.lost()


class EngineChannel:
    """The blocking end; several threads may send, one receives."""

    def __init__(self, end: socket.socket):
        end.setblocking(True)
        self._socket = end
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        """Waits until the socket has taken all of it; raises `OSError` if the connection has ended."""
        content = _encode(message)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(content)))
            self._socket.sendall(content)

    def receive(self) -> Message:
        """Waits for the next message; raises `EOFError` or `OSError` if the connection has ended."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        message: Message = pickle.loads(self._read(length))
        return message

    def _read(self, size: int) -> bytearray:
        content = bytearray()
        while len(content) < size:
            piece = self._socket.recv(min(size - len(content), _PIECE))
            if not piece:
                raise EOFError("the other end of the channel is closed")
            content += piece
        return content


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
