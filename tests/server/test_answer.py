"""Reading an answer: what gathers while the client is slow comes as one delta a sequence."""

import asyncio

from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.server.serving import TOKENIZER, serving


def requests(count: int, **params) -> list[Request]:
    ids = TOKENIZER.encode("hello")
    return [Request(f"r{i}", ids, SamplingParams(max_tokens=99, **params)) for i in range(count)]


def read(count: int, lag: float, **params) -> list[list[tuple[int, str]]]:
    """(choice, text) of each piece, for a reader that takes `lag` seconds over one."""

    async def whole() -> list[list[tuple[int, str]]]:
        async with serving("twelve bytes") as server:
            answer = await server.service.answer(requests(count, **params), [None] * count, whole=False)
            pieces = []
            async for deltas in answer.deltas():
                pieces.append([(delta.index, delta.text) for delta in deltas])
                await asyncio.sleep(lag)
            answer.close()
            return pieces

    return asyncio.run(whole())


def joined(pieces: list[list[tuple[int, str]]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for piece in pieces:
        for index, text in piece:
            texts[index] = texts.get(index, "") + text
    return texts


def test_a_quick_reader_gets_every_step():
    pieces = read(1, lag=0)
    assert len(pieces) == 13
    assert joined(pieces) == {0: "twelve bytes"}


def test_a_slow_reader_gets_merged_pieces():
    pieces = read(1, lag=0.05, n=2)
    assert len(pieces) == 2
    assert joined(pieces) == {0: "twelve bytes", 1: "twelve bytes 1"}
    pieces = read(3, lag=0.05)
    assert len(pieces) <= 9
    assert joined(pieces) == {0: "twelve bytes", 1: "twelve bytes", 2: "twelve bytes"}


def test_a_whole_answer_wakes_its_reader_once():
    async def count() -> int:
        async with serving("twelve bytes") as server:
            answer = await server.service.answer(requests(1), [None], whole=True)
            return len([deltas async for deltas in answer.deltas()])

    assert asyncio.run(count()) == 1
