"""The sampler: distributions, filters and penalties against plain formulae, and independence of rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from octavo.batch import LogprobColumns
from octavo.runner import sampler
from tests.steps import columns
from tests.tolerances import rounding

MASKED = float("-inf")


def draw(logits: torch.Tensor, **given: Any) -> list[int]:
    return sampler.sample(logits.clone(), columns(len(logits), **given))[0].tolist()


def support(logits: torch.Tensor, draws: int = 3000, **given: Any) -> dict[int, float]:
    """Share of each token that is ever drawn from one row of logits."""
    tokens = draw(logits.expand(draws, -1), temperature=given.pop("temperature", 1.0), seed=range(draws), **given)
    return {token: tokens.count(token) / draws for token in sorted(set(tokens))}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["seed", "counter"])
def test_distribution(temperature: float, vary: str) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, MASKED, 0.5, -2.0])
    draws = 40000
    tokens = draw(logits.expand(draws, -1), temperature=temperature, **{vary: range(draws)})
    expected = torch.softmax(logits / temperature, 0).numpy() * draws
    found = np.bincount(tokens, minlength=7)
    assert found[4] == 0
    kept = expected > 0
    chi_square = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, one in a thousand


def test_greedy_is_argmax_and_ties_go_to_the_lowest() -> None:
    logits = torch.randn(6, 50)
    assert draw(logits) == logits.argmax(-1).tolist()
    assert draw(torch.tensor([[0.0, 3.0, 1.0, 3.0, 3.0], [7.0] * 5])) == [1, 0]


def test_rows_are_independent_of_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(24, 3000) * 3
    rng = np.random.default_rng(0)
    given = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7], 24),
        "top_k": rng.choice([0, 1, 5, 4000], 24),
        "top_p": rng.choice([1.0, 0.9, 0.2, 0.9999], 24),
        "min_p": rng.choice([0.0, 0.05], 24),
        "seed": rng.integers(0, 2**63, 24),
        "counter": rng.integers(0, 1000, 24),
        "num_logprobs": rng.choice([-1, 2], 24),
    }
    together = draw(logits, **given)
    assert len(set(together)) > 12
    alone = [draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()})[0] for i in range(24)]
    assert alone == together
    order = rng.permutation(24)
    assert draw(logits[order], **{k: v[order] for k, v in given.items()}) == [together[i] for i in order]


def plain_filter(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Token ids that survive, one step after the other."""
    kept = {i for i, logit in enumerate(logits) if logit > MASKED}
    if top_k:
        edge = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = {i for i in kept if logits[i] >= edge}
    total = sum(math.exp(logits[i]) for i in kept)
    probs = {i: math.exp(logits[i]) / total for i in kept}
    kept = {i for i in kept if sum(p for p in probs.values() if p > probs[i]) < top_p}
    return {i for i in kept if probs[i] >= min_p * max(probs.values())}


@pytest.mark.parametrize("guess", [3, 1024])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (3, 1, 0),
        (1, 1, 0),
        (0, 0.7, 0),
        (0, 0.99, 0),
        (0, 0.01, 0),
        (0, 1, 0.1),
        (6, 0.8, 0.05),
        (100, 0.6, 0.5),
    ],
)
def test_filters(top_k: int, top_p: float, min_p: float, guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_NUCLEUS_GUESS", guess)
    torch.manual_seed(1)
    for _ in range(6):
        logits = torch.randn(12).mul(1.5).round(decimals=1)  # rounded, so that there are ties
        scaled = (logits - logits.max())[None].repeat(2, 1)
        asked = [np.array([a, b], t) for a, b, t in ((top_k, 0, "i4"), (top_p, 1, "f4"), (min_p, 0, "f4"))]
        sampler._filter(scaled, *asked)
        found = set(torch.isfinite(scaled[0]).nonzero()[:, 0].tolist())
        assert found == plain_filter(logits.tolist(), top_k, top_p, min_p)
        assert torch.isfinite(scaled[1]).all(), "a row that asks for nothing keeps everything"


def test_filtered_rows_keep_their_proportions() -> None:
    shares = support(torch.tensor([2.0, 1.0, 0.0, -1.0]), top_k=2)
    assert list(shares) == [0, 1]
    assert abs(shares[0] - 1 / (1 + math.exp(-1))) < 0.04


def test_temperature_comes_before_the_nucleus() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert list(support(logits, top_p=0.7)) == [0, 1]
    assert list(support(logits, top_p=0.7, temperature=0.4)) == [0]
    assert list(support(logits, top_p=0.7, temperature=5.0)) == [0, 1, 2]


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(40, 30) * 100
    assert draw(logits, temperature=1e-38, seed=range(40)) == logits.argmax(-1).tolist()


def test_bias_and_lists() -> None:
    logits = torch.zeros(3, 8)
    logits[:, 5] = 4.0
    given: dict[str, Any] = {"bias_sample": [0, 1], "bias_token": [2, 5], "bias_value": [9.0, MASKED]}
    assert draw(logits, **given) == [2, 0, 5]
    given = {"allowed_sample": [1, 2], "allowed_start": [0, 2, 3], "allowed_token": [6, 7, 4]}
    assert draw(logits, **given) == [5, 6, 4]
    for seed in range(50):
        assert draw(logits, temperature=1.0, seed=seed, **given)[2] == 4, "even with the least noise"


def test_penalties() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 10)
    given: dict[str, Any] = {
        "penalty_sample": [3, 1],
        "penalty_pending": [0, 0],
        # 1, 2, 2, 3 and then 3, 4, 4, 4; 7 and then 8.
        "penalty_start": [0, 4, 6],
        "penalty_token": [1, 2, 3, 4, 7, 8],
        "penalty_count": [0, 0, 1, 3, 0, 1],
        "repetition_penalty": [1.5, 1.0],
        "presence_penalty": [0.3, 0.0],
        "frequency_penalty": [0.2, -1.0],
    }
    found = logits.clone()
    sampler.penalize(found, columns(4, **given))
    expected = logits.clone()
    for token in {1, 2, 3, 4}:
        expected[3, token] *= 1 / 1.5 if expected[3, token] > 0 else 1.5
    expected[3, 3] -= 0.3 + 0.2
    expected[3, 4] -= 0.3 + 3 * 0.2
    expected[1, 8] += 1.0
    torch.testing.assert_close(found, expected)


def test_logprobs_are_of_the_raw_distribution() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 20)
    given: dict[str, Any] = {"bias_sample": [0, 2], "bias_token": [7, 9], "bias_value": [50.0, 50.0]}
    tokens, found = sampler.sample(logits.clone(), columns(3, num_logprobs=[3, -1, 0], **given))
    raw = torch.log_softmax(logits, -1)
    assert tokens.tolist() == [7, int(logits[1].argmax()), 9]
    assert found is not None
    found = LogprobColumns.spread([found.columns()], columns(3, num_logprobs=[3, -1, 0]))
    assert found.token_ids.shape == found.logprobs.shape == (3, 4)
    assert found.token_ids[0].tolist() == [7, *raw[0].topk(3).indices.tolist()]
    most = rounding(20, float(raw.abs().max()))
    np.testing.assert_allclose(found.logprobs[0, 1:], raw[0].topk(3).values, atol=most, rtol=0)
    assert found.token_ids[2, 0] == 9
    for row, token in ((0, 7), (2, 9)):
        assert abs(found.logprobs[row, 0] - float(raw[row, token])) < most
        assert found.rank[row] == 1 + int((raw[row] > raw[row, token]).sum())
