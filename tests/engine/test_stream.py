"""A request's outputs as they reach their reader."""

import asyncio
import contextlib

from octavo.engine.stream import Stream, Wake
from octavo.errors import EngineDeadError
from octavo.request import Request
from octavo.sampling_params import SamplingParams


def stream_of(n: int, whole: bool = False, wake: Wake | None = None) -> Stream:
    return Stream(Request("r", [1, 2], SamplingParams(n=n)), whole, wake)


def test_a_late_token_of_an_aborted_sequence_does_not_end_its_sibling():
    stream = stream_of(2)
    assert not stream.end_sequence(0)  # aborted by the reader, at a stop string
    assert not stream.take(("r", 0, 5, "length", None, None))  # was under way already
    assert stream.open == {1}
    assert stream.take(("r", 1, 6, "stop", None, None))


def test_a_whole_stream_comes_in_one_piece():
    async def read() -> list[int]:
        stream = stream_of(1, whole=True)
        pieces = []

        async def reader() -> None:
            async for arrived in stream:
                pieces.append(len(arrived.tokens))

        task = asyncio.create_task(reader())
        for token in range(3):
            stream.take(("r", 0, token, "length" if token == 2 else None, None, None))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await task
        return pieces

    assert asyncio.run(read()) == [3]


def test_what_comes_while_the_reader_is_busy_is_not_lost():
    async def read() -> list[int]:
        stream, tokens = stream_of(1), []
        stream.take(("r", 0, 0, None, None, None))
        async for arrived in stream:
            tokens += [token[2] for token in arrived.tokens]
            if len(tokens) == 1:
                stream.take(("r", 0, 1, "length", None, None))  # the end, while this piece is being written
        return tokens

    assert asyncio.run(read()) == [0, 1]


def test_an_error_comes_after_the_last_piece_and_not_instead_of_it():
    async def read() -> list[int]:
        stream, tokens = stream_of(1), []
        stream.take(("r", 0, 7, None, None, None))
        stream.fail(EngineDeadError("it died"))
        with contextlib.suppress(EngineDeadError):
            async for arrived in stream:
                tokens += [token[2] for token in arrived.tokens]
            raise AssertionError("the error is lost")
        return tokens

    assert asyncio.run(read()) == [7]


def test_one_reader_of_several_streams_is_told_which():
    async def read() -> None:
        wake = Wake()
        streams = [stream_of(1, wake=wake) for _ in range(3)]
        for i in (2, 0):
            streams[i].take(("r", 0, i, None, None, None))
        assert await wake.wait() == [streams[2], streams[0]]
        assert streams[1].collect() is None
        assert [stream.collect().tokens[0][2] for stream in (streams[0], streams[2])] == [0, 2]
        streams[1].fail(EngineDeadError("gone"))
        assert await wake.wait() == [streams[1]]

    asyncio.run(asyncio.wait_for(read(), 5))
