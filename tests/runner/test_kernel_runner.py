"""The runner on the CPU's kernels: it draws as torch's does, and torch is loaded only by who needs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.config import EngineOptions
from octavo.runner import cpu
from octavo.runner.build import build_executor
from octavo.runner.cpu import KernelRunner
from octavo.runner.model_runner import ModelRunner
from tests.builds import choose, each_build, needs_kernels
from tests.steps import Row, Steps, all_logits, columns
from tests.tiny_models import FolderCheckpoint, runner_for, save_llama
from tests.tolerances import of_logits

pytestmark = needs_kernels
PROMPT = list(range(3, 33))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("kernel_runner"))


def runner_of(folder: Path, **options: object) -> KernelRunner | ModelRunner:
    given = {"model": str(folder), "kv_cache_memory": "4MiB", "max_model_len": 128, "dtype": "float32", "device": "cpu"}
    runner: KernelRunner | ModelRunner = build_executor(EngineOptions(**given | options))[0].runner  # type: ignore
    return runner


def plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    monkeypatch.setattr("octavo.kernels.support.why_not", lambda *_: "this test wants torch")
    runner = runner_of(folder)
    assert isinstance(runner, ModelRunner)
    return runner


def tolerance(folder: Path) -> float:
    """Of a log probability after any token of the prompt."""
    runner = runner_for(FolderCheckpoint(folder))
    return of_logits(runner.model.config, len(PROMPT), float(all_logits(runner, Row(PROMPT)).abs().max()))


@each_build
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 1.0, "seed": [5, 6, 7], "counter": 3},
        {"bias_sample": [1], "bias_token": [9], "bias_value": [99.0]},
        {"num_logprobs": [-1, 2, 0]},
        {"temperature": [0, 1, 0], "top_p": 0.9, "num_logprobs": 1},
    ],
    ids=str,
)
def test_the_same_tokens_and_log_probabilities_as_torchs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], build: str
) -> None:
    choose(monkeypatch, build)

    def results(runner: KernelRunner | ModelRunner) -> object:
        batch = Steps(runner).batch([(Row(PROMPT), 30), (Row(PROMPT[5:]), 25)], columns(3, **asked))
        batch.sample_index = np.array([29, 29, 54])  # two samples of the first row
        return runner.run(batch)

    ours, theirs = results(runner_of(folder)), results(plain(folder, monkeypatch))
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.token_ids.dtype == np.int32
    assert (ours.logprobs is None) == (theirs.logprobs is None)
    if ours.logprobs is not None:
        assert ours.logprobs.token_ids.tolist() == theirs.logprobs.token_ids.tolist()
        np.testing.assert_allclose(ours.logprobs.logprobs, theirs.logprobs.logprobs, atol=tolerance(folder), rtol=0)


@each_build
def test_log_probabilities_of_a_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    choose(monkeypatch, build)
    found = [
        Steps(runner).prompt_logprobs(Row(PROMPT), 30, 2) for runner in (runner_of(folder), plain(folder, monkeypatch))
    ]
    ours, theirs = (result.prompt_logprobs for result in found)
    assert ours.token_ids.shape == (29, 3)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=tolerance(folder), rtol=0)
    assert ours.rank.tolist() == theirs.rank.tolist()


PROGRAM = """
import sys
from octavo import LLM, SamplingParams
llm = LLM({folder!r}, kv_cache_memory="4MiB", max_model_len=128, tokenizer=None)
llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.8, top_p=0.9), use_tqdm=False)
assert "torch" not in sys.modules, "torch was loaded for a draw"
everything = {{"logprobs": 3, "prompt_logprobs": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.1}}
everything |= {{"min_tokens": 2, "logit_bias": {{5: 3.0}}, "allowed_token_ids": list(range(900)), "bad_words": ["no"]}}
llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, **everything), use_tqdm=False)
llm.generate([[3, 4, 5]], SamplingParams(n=2, beam_width=2, temperature=0, max_tokens=4), use_tqdm=False)
assert "torch" not in sys.modules, "torch was loaded in a step"
"""


def test_no_request_loads_torch(smollm2_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM.format(folder=str(smollm2_path))], check=True)


def test_as_many_threads_as_are_asked_for_or_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cpu.num_threads() == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert cpu.num_threads() == 1
