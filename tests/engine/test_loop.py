"""The engine process' loop around an engine that computes nothing."""

import contextlib
import queue
import threading

import pytest

from octavo.engine.channel import EngineChannel, connected_pair
from octavo.engine.loop import serve
from octavo.engine.state import StepOutput
from octavo.errors import InternalError, OctavoError, RequestError
from octavo.metrics import EngineStats
from octavo.request import Request
from octavo.sampling_params import SamplingParams


class OneRequest:
    """An engine whose only request never ends by itself, and that cannot add some."""

    def __init__(self) -> None:
        self.open = False

    def add(self, request: Request) -> None:
        if request.request_id == "a mistake":
            raise RequestError("it is a mistake", "prompt")
        if request.request_id == "a fault":
            raise OverflowError("a number\nis too large")
        self.open = True

    def abort(self, request_id: str, index: int | None) -> None:
        self.open = False

    def has_work(self) -> bool:
        return self.open

    def step(self) -> StepOutput:
        return StepOutput(tokens=[])

    def prepare(self) -> bool:
        return False

    def save_idle(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(running=int(self.open))

    def shutdown(self) -> None:
        pass


@pytest.fixture
def engine():
    """(put a message into the inbox, receive what the loop sends)."""
    ours, theirs = connected_pair()
    client, inbox = EngineChannel(ours), queue.SimpleQueue()
    thread = threading.Thread(target=serve, args=(OneRequest(), EngineChannel(theirs), inbox))
    thread.start()
    yield inbox.put, client.receive
    inbox.put(("stop",))
    while thread.is_alive():  # it may be in the middle of a message
        with contextlib.suppress(TimeoutError):
            ours.settimeout(0.05)
            ours.recv(2**20)
    ours.close()
    theirs.close()


def test_an_abort_without_a_step_after_it_still_tells_the_stats(engine):
    put, receive = engine
    put(("add", Request("r", [1], SamplingParams())))
    assert receive()[2].running == 1
    put(("abort", "r", None))
    while receive()[2].running:
        pass


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a mistake", RequestError, "it is a mistake"),
        ("a fault", InternalError, "OverflowError: a number is too large"),
    ],
)
def test_a_request_that_cannot_be_added_is_refused_and_the_engine_goes_on(engine, name: str, kind, words: str):
    put, receive = engine
    put(("add", Request(name, [1], SamplingParams())))
    what, request_id, error = receive()
    assert (what, request_id) == ("refused", name)
    assert isinstance(error, kind)
    assert isinstance(error, OctavoError)
    assert words in str(error)
    put(("add", Request("r", [1], SamplingParams())))
    assert receive()[2].running == 1
