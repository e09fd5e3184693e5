"""The same answer whatever the blocks, chunks, company, cache or memory: a tiny Llama through the whole engine.

On the CPU's kernels logprobs are bit-identical, by every build and in every precision, since each number is summed in
an order that the step's other rows do not touch. Plain torch leaves that order to its libraries, so there only tokens
are compared.
"""

import random
from dataclasses import dataclass, field

import pytest

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.builds import BUILDS, choose
from tests.poison import poison_free_blocks
from tests.tiny_models import save_llama

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8 KV": {"kv_cache_dtype": "int8"},
}


@dataclass
class Way:
    """A way to compute: `options` of the engine, whether bits are compared, and each request's answer by itself."""

    model: str
    options: dict
    bits: bool
    alone: dict = field(default_factory=dict)

    def build(self, **options):
        engine = Engine.build(
            EngineOptions(
                model=self.model,
                **{"device": "cpu", "kv_cache_memory": "4MiB", "max_model_len": 128} | self.options | options,
            )
        )
        assert (engine.config.weights != "plain") == self.bits
        return engine

    def answer(self, engine, asked):
        """By (request, sample): the tokens, with each one's logprobs where bits are compared."""
        answers = {}
        for request in asked:
            engine.add(request)
        assert poison_free_blocks(engine) > 0
        while engine.has_work():
            output = engine.step()
            assert output.failed == []
            for name, index, token, _, _, logprobs in output.tokens:
                answers.setdefault((name, index), []).append((token, logprobs) if self.bits else token)
            engine.scheduler.check()
            poison_free_blocks(engine)
        assert engine.stats().blocks_owned == 0
        return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(
    scope="module",
    params=[*((build, precision) for build in BUILDS for precision in PRECISIONS), (None, "plain torch")],
    ids=lambda param: " ".join(filter(None, param)),
)
def way(model, request):
    """Each way with its requests answered one by one, without a cache: what every other circumstance must give."""
    with pytest.MonkeyPatch.context() as patch:
        build, precision = request.param
        choose(patch, build)
        made = Way(model, PRECISIONS.get(precision, {}), bits=build is not None)
        engine = made.build(enable_prefix_caching=False)
        for asked in requests():
            made.alone |= made.answer(engine, [asked])
        yield made


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
        made.append(Request(f"r{i}", prompt, SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, **params)))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 4, "max_num_seqs": 4},
        {"max_num_batched_tokens": 33, "max_num_seqs": 5},
    ],
    ids=str,
)
def test_company_chunks_and_cache(way, options):
    assert way.answer(way.build(**options), requests()) == way.alone


# The kernels take multiples of 16 and sum over a context in parts of a length of its own, not of the blocks'.
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_block_size(way, size):
    sizes = (16, 32, 48, 64) if way.bits else (1, 2, 8, 32)
    assert way.answer(way.build(block_size=sizes[size]), requests()) == way.alone


def test_a_second_time_from_the_cache(way):
    engine = way.build()
    way.answer(engine, requests())
    assert way.answer(engine, requests()) == way.alone
    assert engine.stats().prefix_hit_tokens > 100


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forced_preemption(way, mode):
    block_size, num_blocks = (16, 24) if way.bits else (8, 48)
    config = way.build().config
    engine = way.build(
        kv_cache_memory=num_blocks * block_size * config.model.kv_bytes_per_token(config.kv_dtype),
        block_size=block_size,
        max_num_batched_tokens=128,
        swap_space="1MiB",
        preemption_mode=mode,
    )
    assert engine.config.num_blocks == num_blocks
    engine.scheduler._fits_ahead = lambda state, owned_hits: True
    asked = requests() + [
        Request(f"more{i}", [3 + i] * 20, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        for i in range(12)
    ]
    answers = way.answer(engine, asked)
    assert engine.stats().preemptions > 0
    assert (engine.stats().swaps > 0) == (engine.stats().blocks_swapped_in > 0) == (mode == "swap")
    assert {key: tokens for key, tokens in answers.items() if not key[0].startswith("more")} == way.alone
