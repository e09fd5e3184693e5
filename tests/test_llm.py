"""`LLM` where things go wrong: interrupts, exceptions, threads, a fork; `AsyncLLM` in a script without main guard."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.deferred_signals import DeferredSignals
from octavo.errors import ConfigError, EngineDeadError
from tests.server.double import byte_tokenizer
from tests.tiny_models import save_llama

PROMPTS = [[5, 6, 7] * 5, [9, 8], [40 + i for i in range(50)]]
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_llama(tmp_path_factory.mktemp("llama"), vocab_size=258)
    byte_tokenizer().library.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), kv_cache_memory="4MiB", max_model_len=128, max_num_batched_tokens=16, max_num_seqs=8)


def answers(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def right(llm: LLM) -> list[list[int]]:
    return answers(llm)


class Pressed(BaseException):
    """What a signal's handler raises; not one of the exceptions that anybody catches."""


@pytest.fixture
def press():
    """Has a signal come after some seconds, as Ctrl-C would."""

    def raise_pressed(number, frame):
        raise Pressed

    before = signal.signal(signal.SIGALRM, raise_pressed)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def idle(llm: LLM) -> bool:
    stats = llm.engine.stats()
    return not llm.engine.has_work() and not llm._calls and stats.blocks_owned == 0


@pytest.mark.parametrize("how", ["generate", "stream", "iterate"])
def test_an_interrupted_call_leaves_an_llm_that_answers_as_a_fresh_one(llm: LLM, right, press, how: str):
    rng, interrupted = random.Random(how), 0
    for _ in range(60):
        began = time.monotonic()  # each time: a busy machine gets idle, and what came within a call comes too late
        assert answers(llm) == right
        assert idle(llm)
        whole = time.monotonic() - began
        try:
            press(rng.uniform(1e-4, max(2e-4, 1.5 * whole)))
            if how == "generate":
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            elif how == "stream":
                for _ in llm.stream(PROMPTS, PARAMS):
                    pass
            else:
                for _ in llm.generate_iter((prompt, PARAMS) for prompt in PROMPTS):
                    pass
            press(0)  # within: it may come until here
        except Pressed:
            interrupted += 1
    assert answers(llm) == right
    assert idle(llm)
    assert interrupted > 10
    assert signal.getsignal(signal.SIGALRM).__name__ == "raise_pressed"


def test_signals_that_were_noted_run_one_after_the_other_and_handlers_are_restored(press):
    calls = []
    deferred = DeferredSignals()
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        raised = False
        try:
            with deferred, deferred:
                for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGUSR1):
                    os.kill(os.getpid(), number)
                assert calls == []
        except Pressed:
            raised = True
        assert raised
        assert calls == [signal.SIGUSR1] * 2
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(calls) == 3
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_after_an_exception_in_a_step_the_next_call_is_answered(llm: LLM, right, monkeypatch: pytest.MonkeyPatch):
    streaming = llm.stream([PROMPTS[0]], PARAMS)
    next(streaming)
    run, steps = llm.engine.executor.runner.run, []

    def fail(batch):
        steps.append(batch)
        if len(steps) == 4:
            raise MemoryError("no room")
        return run(batch)

    monkeypatch.setattr(llm.engine.executor.runner, "run", fail)
    with pytest.raises(MemoryError, match="no room"):
        answers(llm)
    with pytest.raises(EngineDeadError, match="MemoryError: no room"):
        list(streaming)
    assert idle(llm)
    assert answers(llm) == right


def test_threads_share_an_llm(llm: LLM, right):
    found: dict[int, object] = {}

    def ask(number: int) -> None:
        try:
            for _ in range(5):
                found[number] = answers(llm, [PROMPTS[number % 3]])
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: [right[number % 3]] for number in range(6)}
    assert idle(llm)


def test_calls_that_take_turns_get_their_own_answers(llm: LLM, right):
    streams = [llm.stream([prompt], PARAMS) for prompt in PROMPTS]
    last: list[list[int]] = [[], [], []]
    open_streams = dict(enumerate(streams))
    while open_streams:
        for i, stream in list(open_streams.items()):
            try:
                _, output, _ = next(stream)
                last[i] = list(output.outputs[0].token_ids)
            except StopIteration:
                del open_streams[i]
    assert last == right
    assert idle(llm)


def test_a_forked_child_is_told_to_spawn(llm: LLM):
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            answers(llm)
        except ConfigError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + 20
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert b"'spawn'" in os.read(reader, 1000)
    os.close(reader)


def test_an_async_llm_needs_no_main_guard(folder: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\nfrom octavo import AsyncLLM, SamplingParams\nprint('begin')\n"
        "async def ask():\n"
        f"    async with AsyncLLM({str(folder)!r}, kv_cache_memory='4MiB') as llm:\n"
        "        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)\n"
        "        async for output in llm.generate([5, 6, 7], params):\n"
        "            pass\n"
        "        print(output.outputs[0].finish_reason)\n"
        "asyncio.run(ask())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["begin", "length"], done.stderr


def test_a_request_without_a_possible_token_fails_alone(llm: LLM, right):
    impossible = SamplingParams(max_tokens=5, allowed_token_ids=[7], stop_token_ids=[7], min_tokens=3)
    outputs = llm.generate([PROMPTS[0], PROMPTS[1]], [impossible, PARAMS], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "no token that may come next" in (outputs[0].error or "")
    assert outputs[0].outputs[0].token_ids == []
    assert outputs[1].outputs[0].token_ids == right[1]
    assert outputs[1].error is None
    failed = dict(llm.generate_iter([(PROMPTS[0], impossible)]))
    assert "no token that may come next" in str(failed[0])
    assert idle(llm)
