"""The same tokens whatever the blocks, chunks, company, cache or memory: a tiny Llama through the whole engine."""

import random

import pytest

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.tiny_models import save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


def build(model, **options):
    return Engine.build(EngineOptions(model=model, **{"kv_cache_memory": "4MiB", "max_model_len": 128} | options))


def requests():
    """Greedy and seeded requests of mixed lengths, some with a common beginning, one with three samples."""
    rng = random.Random(5)
    common = [rng.randrange(3, 160) for _ in range(40)]
    made = []
    for i in range(9):
        prompt = common[: 10 * (i % 4)] + [rng.randrange(3, 160) for _ in range(1 + 9 * i)]
        params = (
            {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": i, "top_p": 0.9, "n": 3 if i == 4 else 1}
        )
        params |= {"frequency_penalty": 0.5} if i == 6 else {}
        made.append(Request(f"r{i}", prompt, SamplingParams(max_tokens=12, ignore_eos=True, **params)))
    return made


def answer(engine, asked):
    answers = {}
    for request in asked:
        engine.add(request)
    while engine.has_work():
        for name, index, token, *_ in engine.step().tokens:
            answers.setdefault((name, index), []).append(token)
        engine.scheduler.check()
    assert engine.stats().blocks_owned == 0
    return answers


@pytest.fixture(scope="module")
def alone(model):
    """Each request answered by itself, without a cache: what every other way must give."""
    engine = build(model, enable_prefix_caching=False)
    return {key: tokens for request in requests() for key, tokens in answer(engine, [request]).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 4, "max_num_seqs": 4},
        {"max_num_batched_tokens": 33, "max_num_seqs": 5},
        {"block_size": 1},
        {"block_size": 2},
        {"block_size": 32},
    ],
    ids=str,
)
def test_company_chunks_cache_and_block_size(model, alone, options):
    assert answer(build(model, **options), requests()) == alone


def test_a_second_time_from_the_cache(model, alone):
    engine = build(model)
    answer(engine, requests())
    assert answer(engine, requests()) == alone
    assert engine.stats().prefix_hit_tokens > 100


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forced_preemption(model, alone, mode):
    few = {"kv_cache_memory": 24 * 16 * 512, "block_size": 8, "max_model_len": 128, "max_num_batched_tokens": 128}
    engine = build(model, **few, swap_space="1MiB", preemption_mode=mode)
    assert engine.config.num_blocks == 48
    engine.scheduler._fits_ahead = lambda state, owned_hits: True
    asked = requests() + [
        Request(f"more{i}", [3 + i] * 20, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        for i in range(12)
    ]
    answers = answer(engine, asked)
    assert engine.stats().preemptions > 0
    assert (engine.stats().swaps > 0) == (engine.stats().blocks_swapped_in > 0) == (mode == "swap")
    assert {key: tokens for key, tokens in answers.items() if not key[0].startswith("more")} == alone
