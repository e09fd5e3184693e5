"""`octavo bench serve`: bodies in chunks, and what is counted of a stream that comes in any pieces."""

import asyncio
import json

import pytest

from octavo.cli.bench.serve import Measured, _bench, _Chunks, _Server, add_arguments
from octavo.cli.bench.workloads import between
from octavo.cli.options import Parser
from octavo.errors import OctavoError

BODY = b"7\r\ndata: a\r\n12\r\n\n\ndata: [DONE]\n\n \n\r\n0\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
def test_chunks_come_in_any_pieces(piece: int) -> None:
    chunks = _Chunks()
    found = b"".join(chunks.payload(BODY[start : start + piece]) for start in range(0, len(BODY), piece))
    assert found == b"data: a\n\ndata: [DONE]\n\n \n"
    assert chunks.ended


def events(*lines: str) -> bytes:
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def measured(body: bytes, piece: int) -> Measured:
    """What the client makes of `body`, which a server sends `piece` bytes at a time."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), piece):
            writer.write(body[start : start + piece])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def ask() -> Measured:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await _Server(f"http://127.0.0.1:{port}", None).stream({})

    return asyncio.run(ask())


@pytest.mark.parametrize("piece", [5, 1000])
def test_deltas_and_tokens_are_counted(piece: int) -> None:
    deltas = ['{"choices":[{"text":"a"}]}', '{"choices":[{"text":"b \\"error\\""}]}', '{"choices":[{"text":"c"}]}']
    found = measured(events(*deltas, '{"choices":[],"usage":{"completion_tokens":7}}', "[DONE]"), piece)
    assert found.tokens == 7
    assert len(found.between) == 2
    assert 0 < found.first <= found.whole


@pytest.mark.parametrize("answers", [[503, 503, 200], [404]], ids=str)
def test_it_waits_until_the_server_is_ready(answers: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /ready ")
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 7\r\n\r\nloading" % left.pop(0))
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await _Server(f"http://127.0.0.1:{port}", None).ready()

    asyncio.run(ask())
    assert left == []
    assert capsys.readouterr().err.count("loading") == (1 if 503 in answers else 0)


def test_an_error_in_the_stream_is_told() -> None:
    with pytest.raises(OctavoError, match="out of luck"):
        measured(events('{"choices":[{"text":"a"}]}', '{"error":{"message":"out of luck"}}'), 1000)


def test_the_definitions_are_vllms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A scripted stream: TTFT 0.10 s, chunks 0.05 and 0.15 s later, the usage after that counts for no time."""
    pauses = [0.10, 0.05, 0.15, 0.20]
    chunks = [
        *(b'data: {"choices":[{"text":"%c"}]}\n\n' % letter for letter in b"ab"),
        b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n',
        b'data: {"choices":[],"usage":{"completion_tokens":5}}\n\ndata: [DONE]\n\n',
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /ready"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for pause, chunk in zip(pauses, chunks, strict=True):
                await asyncio.sleep(pause)
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            options = f"--url http://127.0.0.1:{port} --model m --num-prompts 4 --input-len 3-5 --output-len 5 --seed 7"
            parser = Parser(prog="octavo bench serve")
            add_arguments(parser)
            await _bench(parser.parse_args(options.split()))

    asyncio.run(ask())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["TTFT", "TPOT", "ITL", "E2EL"]
    # Later, by what a busy machine adds, but not by the usage's 0.2 s; what lies between follows from the two.
    first, whole, each, between_chunks = (rows[what]["mean_ms"] for what in ("TTFT", "E2EL", "TPOT", "ITL"))
    assert first >= 99
    assert 299 <= whole < 490
    assert 4 * each == pytest.approx(whole - first, abs=0.01)
    assert 2 * between_chunks == pytest.approx(whole - first, abs=0.01)
    assert found["requests"] == 4
    assert found["seconds"] >= 0.5
    assert found["out_tok_s"] == pytest.approx(20 / found["seconds"], rel=0.01)
    prompts, lengths = between(4, (3, 5), (5, 5), 7)
    assert {len(prompt) for prompt in prompts} <= {3, 4, 5}
    assert lengths == [5] * 4
    assert found["total_tok_s"] == pytest.approx((20 + sum(map(len, prompts))) / found["seconds"], rel=0.01)
    assert between(4, (3, 5), (5, 5), 8) != (prompts, lengths)


@pytest.mark.parametrize("lengths", ["0", "5-3", "x", "-1", "3-"])
def test_lengths_that_cannot_be(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="octavo bench serve")
    add_arguments(parser)
    if lengths == "3-":
        assert parser.parse_args(["--input-len", lengths]).input_len == (3, 3)
        return
    with pytest.raises(SystemExit):
        parser.parse_args([f"--input-len={lengths}"])
    assert "--input-len" in capsys.readouterr().err
