"""The default model, in this process and as a server: it answers, alone and in company."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.cli import main
from octavo.errors import RequestError

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(smollm2_path):
    return LLM(str(smollm2_path), max_model_len=2048, kv_cache_memory="512MiB")


def greedy(**params):
    return SamplingParams(temperature=0.0, **{"max_tokens": 24} | params)


def test_it_knows_paris(llm):
    (output,) = llm.chat(PARIS, greedy(), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids[-1] in llm.engine.config.model.eos_token_ids


def test_texts_ids_and_mappings_are_the_same_prompt(llm):
    ids = llm.tokenizer.encode("The sky is")
    outputs = llm.generate(
        ["The sky is", ids, {"prompt": "The sky is"}, {"prompt_token_ids": ids}], greedy(max_tokens=8), use_tqdm=False
    )
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["The sky is", None, "The sky is", None]
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4


def test_a_search_finds_a_likelier_answer_than_greed(llm):
    asked = {"max_tokens": 12, "ignore_eos": True}
    (searched, drawn) = llm.generate(
        ["Once upon a time, in a"] * 2,
        [greedy(beam_width=4, n=2, **asked), greedy(logprobs=0, **asked)],
        use_tqdm=False,
    )
    best, second = searched.outputs
    assert best.beam_score == pytest.approx(best.cumulative_logprob / 12)
    assert best.beam_score >= second.beam_score
    assert best.text != second.text
    assert best.cumulative_logprob > drawn.outputs[0].cumulative_logprob


def test_logprobs_of_answer_and_prompt(llm):
    (output,) = llm.generate(
        "The capital of France is", greedy(max_tokens=3, logprobs=2, prompt_logprobs=0), use_tqdm=False
    )
    sample = output.outputs[0]
    assert [max(entry, key=lambda token: entry[token].logprob) for entry in sample.logprobs] == sample.token_ids
    assert sample.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_a_stop_string_ends_the_answer_in_the_engine_too(llm):
    (output,) = llm.generate("Count: 1, 2, 3,", greedy(stop=[" 7"], max_tokens=200), use_tqdm=False)
    assert output.outputs[0].stop_reason == " 7"
    assert output.outputs[0].text.rstrip().endswith("6,")
    assert not llm.engine.has_work()


def test_a_stream_s_deltas_are_the_whole(llm):
    (whole,) = llm.chat(PARIS, greedy(), use_tqdm=False)
    text = "".join(delta.text for _, _, deltas in llm.stream(llm.encode_chat(PARIS), greedy()) for delta in deltas)
    assert text == whole.outputs[0].text


def test_a_closed_stream_frees_its_blocks(llm):
    stream = llm.stream("Once upon a time", greedy(max_tokens=100))
    next(stream)
    assert llm.engine.stats().blocks_owned > 0
    stream.close()
    assert llm.engine.stats().blocks_owned == 0


def test_one_mistake_runs_nothing(llm):
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate(["fine", []], greedy(), use_tqdm=False)
    with pytest.raises(RequestError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [greedy()], use_tqdm=False)
    assert not llm.engine.has_work()


def test_async_deltas_abort_and_company(smollm2_path):
    async def collect(llm, prompt, **params):
        return "".join([output.outputs[0].text async for output in llm.generate(prompt, greedy(**params))])

    async def check():
        async with AsyncLLM(str(smollm2_path), max_model_len=1024, kv_cache_memory="256MiB") as llm:
            prompts = [f"The number {i} is" for i in range(6)]
            alone = [await collect(llm, prompt) for prompt in prompts]
            together = await asyncio.gather(*(collect(llm, prompt) for prompt in prompts))
            assert list(together) == alone
            stream = llm.generate("Once upon a time", greedy(max_tokens=500))
            await anext(stream)
            await stream.aclose()
            await collect(llm, "x", max_tokens=2)
            assert llm.client.stats.blocks_owned == 0
            assert llm.client.num_open == 0

    asyncio.run(check())


def test_generate_answers_reports_and_resumes(smollm2_path, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": f"Number {i}", "max_tokens": 4, "id": f"n{i}"}) for i in range(5)]
    source.write_text("\n".join([*lines[:2], "not json", *lines[2:], '{"prompt": "x", "max_tokns": 1}']) + "\n")
    command = ["generate", "-i", str(source), "-o", str(target), "--kv-cache-memory", "256MiB", str(smollm2_path)]
    assert main([*command, "--temperature", "0"]) == 1
    errors = capsys.readouterr().err
    assert "line 3: " in errors
    assert "line 7: max_tokns is not a sampling parameter. Did you mean 'max_tokens'?" in errors
    answers = {answer["id"]: answer for answer in map(json.loads, target.read_text().splitlines())}
    assert sorted(answers) == [f"n{i}" for i in range(5)]
    kept = target.read_text().splitlines()[:2]
    target.write_text("\n".join([*kept, '{"line": 5, "te']))
    assert main([*command, "--temperature", "0"]) == 1
    assert "3 answered, 2 already there, 2 bad lines" in capsys.readouterr().err
    assert {a["id"]: a for a in map(json.loads, target.read_text().splitlines())} == answers


def test_chat_answers_a_pipe(smollm2_path):
    command = [sys.executable, "-m", "octavo", "chat", "--temperature", "0", "--max-tokens", "20", str(smollm2_path)]
    done = subprocess.run(command, input=PARIS[0]["content"], capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr


@contextlib.contextmanager
def served(model, tmp_path, *flags):
    """`octavo serve` on a free port: its URL and process."""
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--served-model-name", "small"]
        memory = ["--kv-cache-memory", "512MiB", "--max-model-len", "1024"]
        process = subprocess.Popen([*command, *memory, *flags], stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        line = process.stdout.readline()
        assert "http://" in line, log.read_text()
        yield line.split()[-1], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_server_answers_32_streams_as_it_answers_each_alone(smollm2_path, tmp_path):
    async def ask(client, i):
        stream = await client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": f"Say something about the number {i}."}],
            temperature=0,
            max_tokens=10,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def check(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            reply = await client.chat.completions.create(model="small", messages=PARIS, temperature=0)
            assert "Paris" in reply.choices[0].message.content
            alone = [await ask(client, i) for i in range(32)]
            assert list(await asyncio.gather(*(ask(client, i) for i in range(32)))) == alone
            assert len(set(alone)) > 16

    with served(smollm2_path, tmp_path) as (url, process):
        asyncio.run(check(url))
        metrics = httpx.get(f"{url}/metrics").text
        assert 'octavo_kv_blocks{state="owned"} 0.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_flooding_tenant_does_not_double_anothers_wait(smollm2_path, tmp_path):
    """Medians over a real server, each wait for a prompt of its own so that no cache shortens it."""

    async def wait(client, i):
        text = f"{i} " + " ".join(f"{(i + 3) * k}" for k in range(45))
        began = time.perf_counter()
        await client.completions.create(model="small", prompt=text, max_tokens=1, user="quiet")
        seconds = time.perf_counter() - began
        await asyncio.sleep(1)  # who asks without a pause takes a full share, and may wait for more
        return seconds

    async def flood(client, i):
        await client.completions.create(
            model="small", prompt=f"Tale {i}:", max_tokens=900, user="flood", extra_body={"ignore_eos": True}
        )

    async def check(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await wait(client, 100)
            alone = [await wait(client, i) for i in range(5)]
            floods = [asyncio.create_task(flood(client, i)) for i in range(24)]
            while "octavo_requests_running 6.0" not in (await asyncio.to_thread(httpx.get, f"{url}/metrics")).text:
                await asyncio.sleep(0.05)
            beside = [await wait(client, i) for i in range(5, 10)]
            assert not any(task.done() for task in floods), "the flood must last"
            for task in floods:
                task.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
            print("alone", *(f"{s:.2f}" for s in alone), "beside", *(f"{s:.2f}" for s in beside))
            return statistics.median(alone), statistics.median(beside)

    with served(smollm2_path, tmp_path, "--fair-share", "--max-num-seqs", "6") as (url, _):
        alone, beside = asyncio.run(check(url))
    assert beside <= 2 * alone


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_killed_engine_comes_back(smollm2_path, tmp_path):
    with served(smollm2_path, tmp_path) as (url, process):
        (engine,) = [
            path.name
            for path in Path("/proc").glob("[0-9]*")
            if f"PPid:\t{process.pid}\n" in (path / "status").read_text()
            and b"octavo.engine" in (path / "cmdline").read_bytes()
        ]
        os.kill(int(engine), signal.SIGKILL)
        deadline = time.monotonic() + 60
        seen = set()
        while time.monotonic() < deadline:
            status = httpx.get(f"{url}/ready").status_code
            seen.add(status)
            if status == 200 and 503 in seen:
                break
            time.sleep(0.02)
        assert seen == {200, 503}
        reply = httpx.post(
            f"{url}/v1/completions", json={"model": "small", "prompt": "One, two,", "max_tokens": 3}, timeout=30
        )
        assert reply.status_code == 200
