"""The engine with its model on a GPU: the tokens are those of the CPU."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.batch import NextStep
from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.layers.quant import fp8
from octavo.ops import reference
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.poison import poison_free_blocks
from tests.tiny_models import save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


# What is drawn by a graph, and what is done to logits before.
WISHES = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "n": 2, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.2},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logit_bias": {5: 1.5}, "logprobs": 0},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


def answers(model, device, poisoned=False, **options):
    memory = {"kv_cache_memory": "8MiB", "max_model_len": 128, "dtype": "float32"}
    engine = Engine.build(EngineOptions(model=model, device=device, **memory | options))
    for i in range(12):
        params = WISHES[i % len(WISHES)] | {"max_tokens": 16, "ignore_eos": True, "seed": i}
        prompt = [3 + (7 * i + k * k) % 150 for k in range(1 + 8 * i)]
        engine.add(Request(f"r{i}", prompt, SamplingParams(**params)))
    found = {}
    while engine.has_work():
        if poisoned:
            torch.cuda.synchronize()  # a step under way
            poison_free_blocks(engine)
            torch.cuda.synchronize()
        output = engine.step()
        assert output.failed == []
        for name, index, token, *_ in output.tokens:
            found.setdefault((name, index), []).append(token)
        engine.scheduler.check()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"max_num_batched_tokens": 24}], ids=str)
def test_nobody_reads_what_lies_in_freed_blocks(tmp_path, dtype, options):
    """Heads of 64 and 16 bits take the kernels that copy whole blocks."""
    options = options | {"dtype": dtype, "max_num_seqs": 12}
    model = str(save_llama(tmp_path, head_dim=64))
    assert answers(model, "cuda", poisoned=True, **options) == answers(model, "cuda", **options)


@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {"temperature": 0.9}, {"logprobs": 2}], ids=str)
def test_a_row_without_a_possible_token_fails_alone(tmp_path, wishes):
    """Its token has been looked up by the step after it before the host knows."""
    memory = {"kv_cache_memory": "8MiB", "max_model_len": 128, "dtype": "float32"}
    engine = Engine.build(EngineOptions(model=str(save_llama(tmp_path)), device="cuda", **memory))

    def run(*others):
        for i in range(6):
            params = SamplingParams(max_tokens=20, ignore_eos=True, seed=i, **wishes)
            engine.add(Request(f"r{i}", [3 + i, 5, 7], params))
        for request in others:
            engine.add(request)
        found, failed = {}, []
        while engine.has_work():
            output = engine.step()
            failed += output.failed
            for name, _, token, *_ in output.tokens:
                assert 0 <= token < 160
                found.setdefault(name, []).append(token)
            engine.scheduler.check()
        return found, failed

    alone, failed = run()
    assert failed == []
    impossible = {"allowed_token_ids": [9], "bad_words": ["x"], "max_tokens": 9}
    request = Request("impossible", [4, 5], SamplingParams(**impossible, **wishes))
    request.bad_words_token_ids = [[9, 9, 9]]  # after two of the one token that is allowed
    found, failed = run(request)
    assert [name for name, _ in failed] == ["impossible"]
    assert "no token that may come next" in str(failed[0][1])
    assert found.pop("impossible") == [9, 9]
    assert found == alone


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_beams_and_swapped_blocks(tmp_path, kv):
    model = str(save_llama(tmp_path))

    def search(**options):
        options = {"dtype": "float32", "max_model_len": 64, "block_size": 4} | options
        engine = Engine.build(EngineOptions(model=model, **options))
        engine.scheduler._fits_ahead = lambda state, owned_hits: True
        params = SamplingParams(beam_width=4, n=4, temperature=0.0, max_tokens=24, ignore_eos=True)
        for i in range(6):
            engine.add(Request(f"r{i}", [3 + (7 * i + k * k) % 150 for k in range(5 + 4 * i)], params))
        found = {}
        while engine.has_work():
            for name, index, token, *_ in engine.step().tokens:
                found.setdefault((name, index), []).append(token)
            engine.scheduler.check()
        return found, engine.stats().swaps

    few = {"kv_cache_memory": 64 * 4 * (128 if kv == "fp8" else 512), "swap_space": "1MiB", "preemption_mode": "swap"}
    on_gpu, swaps = search(device="cuda", kv_cache_dtype=kv, **few)
    assert swaps > 0
    enough = {"device": "cuda", "kv_cache_dtype": "fp8"} if kv == "fp8" else {"device": "cpu"}
    assert on_gpu == search(kv_cache_memory="8MiB", **enough)[0]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24, "max_num_seqs": 6}], ids=str)
def test_the_tokens_are_the_cpu_s(tmp_path, options):
    model = str(save_llama(tmp_path))
    assert answers(model, "cuda", **options) == answers(model, "cpu", **options)


def test_steps_go_on_from_what_the_one_before_left_on_the_device(tmp_path):
    model = str(save_llama(tmp_path))

    def plain_answers(device):
        memory = {"kv_cache_memory": "16MiB", "max_model_len": 128, "max_num_seqs": 40}
        engine = Engine.build(EngineOptions(model=model, device=device, dtype="float32", **memory))
        continued, submit = [], engine.executor.submit
        engine.executor.submit = lambda step, whole: (
            continued.append(isinstance(step, NextStep)),
            submit(step, whole),
        )
        found = {}

        def step():
            for name, index, token, *_ in engine.step().tokens:
                found.setdefault((name, index), []).append(token)
            engine.scheduler.check()

        for i in range(36):
            params = {"temperature": 0.0} if i % 3 else {"temperature": 0.9, "seed": i, "n": (1, 6)[i % 2]}
            prompt = [3 + (7 * i + k * k) % 150 for k in range(1 + 2 * i)]
            engine.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=30 + 5 * (i % 5), ignore_eos=True, **params)))
            if i % 12 == 11:
                for _ in range(9):
                    step()
        while engine.has_work():
            step()
        return found, sum(continued)

    (on_gpu, continued), (on_cpu, _) = plain_answers("cuda"), plain_answers("cpu")
    assert continued > 30
    assert on_gpu == on_cpu


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("wishes", [WISHES[:1], WISHES], ids=["plain", "all"])
def test_no_step_waits_for_the_device(tmp_path, wishes):
    """Neither decoding nor prompts, joining and ending: the only wait is for the tokens of the step before."""
    memory = {"kv_cache_memory": "16MiB", "max_model_len": 128, "max_num_seqs": 16}
    engine = Engine.build(EngineOptions(model=str(save_llama(tmp_path)), device="cuda", dtype="float32", **memory))

    def round_of(names):
        ended = 0
        for i, name in enumerate(names):
            prompt = [3 + (7 * i + k * k) % 150 for k in range(4 + 9 * i)]
            params = wishes[i % len(wishes)] | {"max_tokens": 12 + i, "ignore_eos": True}
            engine.add(Request(name, prompt, SamplingParams(**params)))
            for _ in range(3):
                ended += sum(reason is not None for *_, reason, _, _ in engine.step().tokens)
        while engine.has_work():
            ended += sum(reason is not None for *_, reason, _, _ in engine.step().tokens)
        assert ended >= len(names)

    round_of([f"warm{i}" for i in range(6)])  # kernels are compiled and graphs recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        round_of([f"again{i}" for i in range(6)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp8_weights_are_the_rounded_ones(tmp_path):
    """With activations of fp32, which are not rounded, tokens are those of a model whose weights were rounded."""
    model = save_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if "layers" in name and weight.dim() == 2:
            rounded = reference.linear(torch.eye(weight.shape[1]), fp8.quantize(weight)).T
            assert (rounded - weight).abs().max() > 1e-4
            weights[name] = rounded.contiguous()
    other = save_llama(tmp_path / "rounded")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert answers(str(model), "cuda", quantize="fp8") == answers(str(other), "cpu")
