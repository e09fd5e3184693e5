"""The two sides of the process boundary, each without the other."""

import asyncio
import queue
import threading
from multiprocessing import Pipe, Value

from octavo.engine.process import Stream, _serve
from octavo.engine.state import StepOutput
from octavo.metrics import EngineStats
from octavo.request import Request
from octavo.sampling_params import SamplingParams


def stream_of(n: int, whole: bool = False) -> Stream:
    return Stream(Request("r", [1, 2], SamplingParams(n=n)), whole)


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


class OneRequest:
    """An engine whose only request never ends by itself."""

    def __init__(self) -> None:
        self.open = False

    def add(self, request: Request) -> None:
        self.open = True

    def abort(self, request_id: str, index: int | None) -> None:
        self.open = False

    def has_work(self) -> bool:
        return self.open

    def step(self) -> StepOutput:
        return StepOutput(tokens=[])

    def save_idle(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(running=int(self.open))

    def shutdown(self) -> None:
        pass


def test_an_abort_without_a_step_after_it_still_tells_the_stats():
    ours, theirs = Pipe()
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    thread = threading.Thread(target=_serve, args=(OneRequest(), theirs, inbox, Value("d", 0.0, lock=False)))
    thread.start()
    inbox.put(("add", Request("r", [1], SamplingParams())))
    assert ours.poll(5)
    assert ours.recv()[2].running == 1
    inbox.put(("abort", "r", None))
    while ours.poll(1):
        last = ours.recv()
    inbox.put(("stop",))
    thread.join(5)
    assert last[2].running == 0
