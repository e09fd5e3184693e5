"""Whole steps: samples, prompt log probabilities, copied blocks, and the executor around them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from octavo.models import read_config
from octavo.runner import model_runner, sampler
from octavo.runner.executor import Executor, LocalExecutor
from octavo.runner.model_runner import ModelRunner
from tests.steps import Row, Steps, columns
from tests.tiny_config import engine_config
from tests.tiny_models import FolderCheckpoint, runner_for, save_llama
from tests.tolerances import of_logits, rounding

PROMPT = np.random.default_rng(0).integers(3, 160, 30).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    return runner_for(FolderCheckpoint(folder))


@pytest.fixture(scope="module")
def raw(folder: Path) -> torch.Tensor:
    """Log probabilities after each token of PROMPT, from the reference."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)


def tolerance(runner: ModelRunner, raw: torch.Tensor) -> float:
    return of_logits(runner.model.config, len(PROMPT), float(raw.abs().max()))


def test_logprobs_of_samples(runner: ModelRunner, raw: torch.Tensor) -> None:
    result = Steps(runner).run([(Row(PROMPT), 30)], columns(1, num_logprobs=4))
    assert result.logprobs is not None
    best = raw[-1].topk(4)
    assert result.token_ids.dtype == np.int32
    assert result.logprobs.token_ids[0].tolist() == [int(best.indices[0]), *best.indices.tolist()]
    np.testing.assert_allclose(result.logprobs.logprobs[0, 1:], best.values, atol=tolerance(runner, raw), rtol=0)
    assert result.logprobs.rank.tolist() == [1]


def test_samples_are_the_same_however_many_are_drawn_at_once(
    runner: ModelRunner, raw: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = columns(
        7,
        temperature=[0, 0.7, 0.9, 0, 1, 1, 0.8],
        top_k=[0, 0, 20, 0, 0, 0, 9],
        top_p=[1, 0.9, 1, 1, 1, 0.5, 1],
        seed=range(7),
        num_logprobs=[-1, -1, -1, 2, -1, -1, 4],
        bias_sample=[1, 4, 4],
        bias_token=[7, 8, 9],
        bias_value=[5.0, 6.0, -3.0],
        allowed_sample=[0, 5],
        allowed_start=[0, 3, 5],
        allowed_token=[4, 5, 6, 90, 91],
        penalty_sample=[3, 6],
        repetition_penalty=[2.0, 1.5],
        presence_penalty=[0.5, 0.0],
        frequency_penalty=[0.0, 0.7],
        penalty_pending=[0, 0],
        penalty_start=[0, 4, 7],
        penalty_token=[5, 6, 7, 8, 9, 10, 11],
        penalty_count=[0, 0, 1, 1, 1, 0, 1],
    )
    results = []
    for at_once in (2**24, 160 * 3, 160 * 2, 1):
        monkeypatch.setattr(model_runner, "_LOGITS_AT_ONCE", at_once)
        results.append(Steps(runner).run([(Row(PROMPT[i:]), 30 - i) for i in range(7)], sampling))
    for result in results[1:]:
        assert result.token_ids.tolist() == results[0].token_ids.tolist()
        found, expected = result.logprobs, results[0].logprobs
        assert found is not None
        assert expected is not None
        for sample, count in ((3, 3), (6, 5)):
            assert found.token_ids[sample, :count].tolist() == expected.token_ids[sample, :count].tolist()
            # The same hidden states through the head, and the distribution's own sum.
            most = rounding(runner.model.config.hidden_size + 160, float(raw.abs().max()))
            np.testing.assert_allclose(
                found.logprobs[sample, :count], expected.logprobs[sample, :count], atol=most, rtol=0
            )
            assert found.rank[sample] == expected.rank[sample]


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_prompt_logprobs_in_any_chunks(
    runner: ModelRunner, raw: torch.Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_PROMPT_LOGPROBS_AT_ONCE", at_once)
    steps, row = Steps(runner), Row(PROMPT)
    found = [steps.prompt_logprobs(row, count, k=2).prompt_logprobs for count in (11, 12, 7)]
    targets = torch.tensor(PROMPT[1:])
    assert np.concatenate([part.token_ids[:, 0] for part in found if part]).tolist() == PROMPT[1:]
    logprobs = np.concatenate([part.logprobs for part in found if part])
    most = tolerance(runner, raw)
    np.testing.assert_allclose(logprobs[:, 0], raw[:-1].gather(1, targets[:, None])[:, 0], atol=most, rtol=0)
    np.testing.assert_allclose(logprobs[:, 1:], raw[:-1].topk(2).values, atol=most, rtol=0)


def test_n_samples_of_one_token(runner: ModelRunner) -> None:
    sampling = columns(4, temperature=[0, 1, 1, 0], seed=[0, 1, 2, 0], bias_sample=[3], bias_token=[9], bias_value=[99])
    batch = Steps(runner).batch([(Row(PROMPT), 30)], sampling)
    batch.sample_index = np.full(4, 29, np.int32)
    greedy, first, second, biased = runner.run(batch).token_ids.tolist()
    assert biased == 9 != greedy
    assert first != second


def test_seeded_rows_alone_and_together(folder: Path) -> None:
    def answer(companions: int) -> list[int]:
        steps = Steps(runner_for(FolderCheckpoint(folder)))
        rows = [Row(PROMPT)] + [Row(PROMPT[i:]) for i in range(1, companions + 1)]
        for step in range(12):
            seeds = [77, *range(companions)]
            sampling = columns(len(rows), temperature=1.0, seed=seeds, counter=step, top_p=0.95)
            steps.run([(row, len(row.token_ids) - row.num_computed) for row in rows], sampling)
        return rows[0].token_ids[len(PROMPT) :]

    assert answer(0) == answer(5)


def test_a_step_without_samples_gives_none(runner: ModelRunner) -> None:
    result = Steps(runner).run([(Row(PROMPT), 5)])
    assert result.token_ids.tolist() == []
    assert result.logprobs is None
    assert result.prompt_logprobs is None


def test_copied_block_continues_alike(runner: ModelRunner) -> None:
    steps = Steps(runner)
    row = Row(PROMPT[:10])
    steps.run([(row, 10)])
    twin = Row(row.token_ids, num_computed=10, block_table=list(row.block_table))
    twin.block_table[-1] = steps.free.pop()
    batch = steps.batch([(row, 1), (twin, 1)])
    batch.block_copies = np.array([[row.block_table[-1], twin.block_table[-1]]], np.int32)
    first, second = runner.run(batch).token_ids.tolist()
    assert first == second


def test_local_executor(folder: Path, runner: ModelRunner) -> None:
    checkpoint = FolderCheckpoint(folder)
    config = engine_config(read_config(checkpoint.config), max_model_len=64, num_blocks=512, max_num_seqs=4)
    executor: Executor = LocalExecutor.load(checkpoint, config)
    steps = Steps(runner)
    batches = [steps.batch([(Row(PROMPT[i:]), 30 - i)]) for i in range(3)]
    for batch in batches:
        executor.submit(batch, lambda batch=batch: batch)
    found = [executor.result().token_ids.tolist() for _ in batches]
    assert found == [runner.run(batch).token_ids.tolist() for batch in batches]
    executor.shutdown()
