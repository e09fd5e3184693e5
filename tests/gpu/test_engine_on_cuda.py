"""The engine with its model on a GPU: the tokens are those of the CPU."""

import pytest
import torch

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.tiny_models import save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def answers(model, device, **options):
    memory = {"kv_cache_memory": "8MiB", "max_model_len": 128}
    engine = Engine.build(EngineOptions(model=model, device=device, dtype="float32", **memory | options))
    for i in range(12):
        params = {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": i, "top_k": 20, "n": 2}
        prompt = [3 + (7 * i + k * k) % 150 for k in range(1 + 8 * i)]
        engine.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=16, ignore_eos=True, logprobs=2, **params)))
    found = {}
    while engine.has_work():
        for name, index, token, *_ in engine.step().tokens:
            found.setdefault((name, index), []).append(token)
        engine.scheduler.check()
    return found


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24, "max_num_seqs": 6}], ids=str)
def test_the_tokens_are_the_cpu_s(tmp_path, options):
    model = str(save_llama(tmp_path))
    assert answers(model, "cuda", **options) == answers(model, "cpu", **options)
