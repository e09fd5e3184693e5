"""`--deterministic` on a GPU: tokens and log probabilities are the same bits, in whatever company they are computed."""

import json

import pytest
import torch

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
PREFIX = [7 + 31 * i % 3000 for i in range(300)]


def requests():
    """Greedy and drawn, with and without log probabilities, short and long, some with a beginning in common."""
    for i in range(24):
        own = [5 + (i * 97 + k * k) % 4000 for k in range(1 + 23 * i % 340)]
        params = {"temperature": 0.0} if i % 3 == 0 else {"temperature": 0.9, "seed": i}
        params |= {"top_k": 50} if i % 8 == 5 else {}
        params |= {"logprobs": 3} if i % 2 else {}
        yield Request(f"r{i}", PREFIX + own if i % 4 == 0 else own, SamplingParams(max_tokens=24, **params))


def answers(engine, asked):
    found = {}
    for request in asked:
        engine.add(request)
    while engine.has_work():
        for name, index, token, _, _, logprobs in engine.step().tokens:
            found.setdefault((name, index), []).append((token, logprobs))
        engine.scheduler.check()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16"}, {"quantize": "fp8", "kv_cache_dtype": "fp8"}], ids=lambda o: str(o) or "plain"
)
def test_the_same_bits_in_any_company(tmp_path, options):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def build(**more):
        given = {"kv_cache_memory": "256MiB", "max_model_len": 1024, "max_num_seqs": 64} | options | more
        return Engine.build(
            EngineOptions(model=str(tmp_path), load_format="dummy", device="cuda", deterministic=True, **given)
        )

    engine = build(enable_prefix_caching=False)
    alone = {}
    for request in requests():
        alone |= answers(engine, [request])
    assert len({tuple(token for token, _ in answer) for answer in alone.values()}) > 20
    together = {
        "one batch": answers(engine, list(requests())),
        "in reverse": answers(engine, list(requests())[::-1]),
        "prefix cache": answers(build(), list(requests())),
        "small chunks": answers(build(max_num_batched_tokens=70, max_num_seqs=9), list(requests())),
        "odd chunks": answers(build(max_num_batched_tokens=33, max_num_seqs=33), list(requests())),
    }
    cached = build()
    answers(cached, list(requests()))
    together["all of it cached"] = answers(cached, list(requests()))
    block = 3 * 2 * 8 * 128 * 16 * (1 if options.get("kv_cache_dtype") else 2)
    few = build(kv_cache_memory=120 * block)
    few.scheduler._fits_ahead = lambda state, owned_hits: True
    together["preempted"] = answers(few, list(requests()))
    assert few.stats().preemptions > 0
    for how, found in together.items():
        wrong = [name for name in alone if found[name] != alone[name]]
        assert not wrong, (how, wrong)
