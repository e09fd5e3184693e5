"""A GPU's memory: the cache takes what steps leave, and no request can make it too little."""

import gc
import json

import pytest
import torch

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.errors import CapacityError
from octavo.request import Request
from octavo.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Large in what counts here (vocabulary, keys a token), small in weights.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 1024,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
WISHES = [
    {},
    {"logprobs": 20},
    {"top_p": 0.999, "temperature": 5.0},
    {"top_k": 1000, "min_p": 0.001},
    {"repetition_penalty": 1.1, "presence_penalty": 0.1},
    {"logit_bias": {5: 1.0}},
    {"prompt_logprobs": 5},
    {"n": 3},
]


@pytest.fixture(autouse=True)
def nothing_held():
    gc.collect()
    torch.cuda.empty_cache()


def test_a_cache_filled_to_the_last_block(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    share = 0.95
    engine = Engine.build(
        EngineOptions(
            model=str(tmp_path),
            load_format="dummy",
            device="cuda",
            max_num_seqs=256,
            gpu_memory_utilization=share,
            preemption_mode="recompute",
            swap_space=0,
        )
    )
    free, total = torch.cuda.mem_get_info()
    blocks = engine.config.num_blocks
    print(
        dict(engine.timeline),
        "\n",
        "\n ".join(engine.plan.lines()),
        f"\n {(total - free) / total:.4f} in use",
        flush=True,
    )
    assert 0.02 < 1 - (total - free) / total < 1 - share + 0.05, "the share is filled"
    # More tokens than the cache holds, in requests that grow while nobody looks ahead.
    engine.scheduler._fits_ahead = lambda state, owned_hits: True
    length = min(blocks * 16 // 200, 7000)
    for i in range(230):
        prompt = [1 + (i * 7919 + k * 31 + k * k) % 150_000 for k in range(length)]
        params = {"temperature": 0.8, "seed": i, "max_tokens": 400, "ignore_eos": True} | WISHES[i % len(WISHES)]
        engine.add(Request(f"r{i}", prompt, SamplingParams(**params)))
    least, fullest, ended = free, 0, 0
    while engine.has_work():
        ended += sum(reason is not None for *_, reason, _, _ in engine.step().tokens)
        least = min(least, torch.cuda.mem_get_info()[0])
        fullest = max(fullest, engine.stats().blocks_owned)
    stats = engine.stats()
    print(f" {blocks} blocks, {fullest} owned at most, {stats.preemptions} preemptions, {(total - least) / total:.4f}")
    assert fullest > 0.99 * blocks
    assert stats.preemptions > 0
    assert ended == sum(WISHES[i % len(WISHES)].get("n", 1) for i in range(230))
    assert (total - least) / total < share, "the measured step is the largest"


def test_a_step_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    from octavo.runner import cuda_memory

    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    monkeypatch.setattr(cuda_memory, "_run_largest_steps", lambda *_: torch.empty(2**41, device="cuda"))
    with pytest.raises(CapacityError, match=r"lower max_num_batched_tokens \(8192\) or max_num_seqs \(256\)"):
        Engine.build(EngineOptions(model=str(tmp_path), load_format="dummy", device="cuda"))
