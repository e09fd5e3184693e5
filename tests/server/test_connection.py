"""Clients that send or read too slowly, too much, or what is no HTTP: real sockets on a process with short bounds."""

import contextlib
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.served import request_bytes
from tests.server.test_lifetime import Process, ask, server

BOUNDS = {"HEAD_SECONDS": 0.5, "BODY_SECONDS": 0.8, "UNREAD_SECONDS": 0.5, "LINGER_SECONDS": 0.4}
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"


def connect(process: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(process.url.rsplit(":")[-1])), timeout=10)


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def dribble(client: socket.socket, byte: bytes, seconds: float) -> float:
    """Sends a byte now and then until the server closes; how long that took. Fails after `seconds`."""
    began = time.monotonic()
    client.settimeout(0.05)
    while time.monotonic() - began < seconds:
        try:
            client.sendall(byte)
            if client.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("the server did not end it")
    client.settimeout(10)
    return time.monotonic() - began


def error_of(answer: bytes, status: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    return json.loads(body)["error"]


def test_heads_and_bodies_have_a_time(tmp_path: Path):
    with server(tmp_path, connection=BOUNDS) as process:
        with connect(process) as silent:
            assert all_of(silent) == b""
        with connect(process) as slow:
            slow.sendall(GET + b"X-Slow: ")
            assert 0.4 < dribble(slow, b"x", 3) < 2
            assert "headers did not come" in error_of(all_of(slow), b"408 ")["message"]
        with connect(process) as none:
            none.sendall(POST + b"Content-Length: 100\r\n\r\n{")
            assert "body did not come" in error_of(all_of(none), b"408 ")["message"]
        with connect(process) as slow:
            slow.sendall(POST + b"Content-Length: 100000\r\n\r\n{")
            assert 0.7 < dribble(slow, b" ", 3) < 2.3
            assert error_of(all_of(slow), b"408 ")["type"] == "invalid_request_error"
        with connect(process) as kept:  # what is in time is answered, and again after a pause
            for _ in range(2):
                kept.sendall(GET[:20])
                time.sleep(0.2)
                kept.sendall(GET[20:] + b"\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += kept.recv(4096)
                assert answer.startswith(b"HTTP/1.1 200")
                time.sleep(0.7)
        # An answer may take longer than a body.
        slow_answer = httpx.post(f"{process.url}/v1/chat/completions", json=ask("slow"))
        assert slow_answer.elapsed.total_seconds() > BOUNDS["BODY_SECONDS"]
        assert slow_answer.status_code == 200
        assert "Traceback" not in process.log


def test_heads_and_bodies_have_a_size(tmp_path: Path):
    options = {"max_body_bytes": 100_000, "api_key": "secret"}
    with server(tmp_path, connection=BOUNDS | {"BODY_SECONDS": 60}, options=options) as process:
        for endless in (b"X: " + b"x" * 1000 + b"\r\n", b"x" * 1000):
            with connect(process) as client:
                client.sendall(GET + b"Y: ")
                sent = 0
                client.settimeout(1)
                with contextlib.suppress(ConnectionError, TimeoutError):
                    while sent < 60_000_000:
                        client.sendall(endless)
                        sent += len(endless)
                assert sent < 20_000_000  # what lies in the system's buffers
        with connect(process) as client:
            client.sendall(GET + b"Y: " + b"x" * 70_000)
            assert "larger than 65536 bytes" in error_of(all_of(client), b"431 ")["message"]
        key = b"Authorization: Bearer secret\r\n"
        with connect(process) as client:
            client.sendall(POST + key + b"Transfer-Encoding: chunked\r\n\r\n")
            client.sendall((b"3e8\r\n" + b" " * 1000 + b"\r\n") * 110)
            assert "larger than 100000 bytes" in error_of(all_of(client), b"413 ")["message"]
        with connect(process) as client:
            client.sendall(POST + key + b"Content-Length: 99999999\r\n\r\n")
            assert error_of(all_of(client), b"413 ")["code"] == "body_too_large"
        big = POST + b"Content-Length: 20000000\r\n" + key
        for more in (b"", b"Connection: close\r\n"):  # clients that send all before they read
            with connect(process) as client:
                client.sendall(big + more + b"\r\n" + b" " * 20_000_000)
                assert error_of(client.recv(65536), b"413 ")["code"] == "body_too_large"
                assert all_of(client) == b""
        with connect(process) as client:  # without the key nobody waits for the body
            client.sendall(POST + b"Content-Length: 90000\r\n\r\n")
            assert error_of(all_of(client), b"401 ")["code"] == "invalid_api_key"


def test_bodies_have_a_size_together(tmp_path: Path):
    with server(tmp_path, options={"max_body_bytes": 2000}) as process:
        clients = [connect(process) for _ in range(80)]
        try:
            for client in clients:
                client.sendall(POST + b"Content-Length: 2000\r\n\r\n" + b" " * 1999)
            time.sleep(0.5)
            for client in clients:
                client.sendall(b"x")
            statuses = [client.recv(4096).split()[1] for client in clients]
        finally:
            for client in clients:
                client.close()
        assert set(statuses) == {b"400", b"429"}
        assert statuses.count(b"400") >= 64
        assert httpx.post(f"{process.url}/v1/chat/completions", json=ask("hello")).status_code == 200


def test_a_client_that_stops_reading_is_cut_off(tmp_path: Path):
    body = json.dumps({"prompt": "x" * 400, "echo": True, "n": 30, "max_tokens": 1}).encode()
    request = request_bytes("POST", "/v1/completions", body)
    with server(tmp_path, connection=BOUNDS) as process, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", int(process.url.rsplit(":")[-1])))
        client.sendall(request * 1000)  # answers of 16 MB
        assert httpx.post(f"{process.url}/v1/chat/completions", json=ask("hello")).status_code == 200
        time.sleep(3 * BOUNDS["UNREAD_SECONDS"])
        assert len(all_of(client)) < 6_000_000
        assert "Traceback" not in process.log


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\0\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_is_no_http_is_told_in_the_shape_of_other_errors(tmp_path: Path, sent: bytes):
    with server(tmp_path) as process, connect(process) as client:
        client.sendall(sent)
        assert error_of(all_of(client), b"400 Bad Request\r\n")["type"] == "invalid_request_error"
