"""Messages between the processes: any size, in order, with either end slow, and an end that is lost."""

import asyncio
import threading
import time

import pytest
import uvloop

from octavo.engine.channel import ClientChannel, EngineChannel, Message, connected_pair


class Owner:
    """Keeps what the client's end is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.was_lost = asyncio.Event()

    def receive(self, message: Message) -> None:
        self.messages.append(message)

    def lost(self) -> None:
        self.was_lost.set()

    async def has(self, count: int) -> list[Message]:
        while len(self.messages) < count:
            await asyncio.sleep(0.002)
        return self.messages


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request):
    """Runs a coroutine on each kind of loop: uvloop leaves the descriptors that it watches without blocking."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def on_loop(test) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30):
                ours, theirs = connected_pair()
                engine, owner = EngineChannel(theirs), Owner()
                channel = await ClientChannel.open(ours, owner)
                try:
                    await test(channel, owner, engine)
                finally:
                    channel.abort()
                    theirs.close()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(whole())

    return on_loop


def test_what_the_engine_does_not_read_waits_and_holds_nobody_up(run):
    async def test(channel: ClientChannel, owner: Owner, engine: EngineChannel) -> None:
        began = time.monotonic()
        sent = [("add", i, list(range(300, 300 + 2000 * (i % 7)))) for i in range(1000)]
        for message in sent:
            channel.send(message)  # some 16 MB; a socket's buffer takes a fraction of one
        assert time.monotonic() - began < 5
        await asyncio.sleep(0.1)
        received = await asyncio.to_thread(lambda: [engine.receive() for _ in sent])
        assert received == sent

    run(test)


def test_a_message_of_fifty_megabytes_arrives_in_either_direction(run):
    async def test(channel: ClientChannel, owner: Owner, engine: EngineChannel) -> None:
        large = bytes(range(256)) * 200_000
        sending = asyncio.create_task(asyncio.to_thread(engine.send, "step", large))
        channel.send(("add", large))
        assert await asyncio.to_thread(engine.receive) == ("add", large)
        assert await owner.has(1) == [("step", large)]
        await sending

    run(test)


def test_threads_that_send_at_once_do_not_mix_their_messages(run):
    async def test(channel: ClientChannel, owner: Owner, engine: EngineChannel) -> None:
        def send(number: int) -> None:
            for i in range(50):
                engine.send(number, i, b"x" * (1000 * (i % 5)) + bytes([number]))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        messages = await owner.has(200)
        for number in range(4):
            assert [m[1] for m in messages if m[0] == number] == list(range(50))

    run(test)


def test_a_lost_engine_is_told_once_and_sending_to_it_is_no_error(run):
    async def test(channel: ClientChannel, owner: Owner, engine: EngineChannel) -> None:
        engine.send("last")
        engine._socket.close()
        await owner.was_lost.wait()
        assert owner.messages == [("last",)], "what came before the end is not lost"
        channel.send(("add", b"x" * 100_000))

    run(test)


def test_a_lost_client_ends_what_the_engine_waits_for(run):
    async def test(channel: ClientChannel, owner: Owner, engine: EngineChannel) -> None:
        channel.send(("stop",))
        channel.close()
        assert await asyncio.to_thread(engine.receive) == ("stop",)
        with pytest.raises((EOFError, OSError)):
            await asyncio.to_thread(engine.receive)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            await asyncio.to_thread(lambda: [engine.send("step", b"x" * 2**20) for _ in range(8)])
        assert not owner.was_lost.is_set(), "closed here, so there is nothing to tell"

    run(test)
