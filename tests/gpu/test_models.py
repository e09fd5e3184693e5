"""Models on a GPU: every family's greedy tokens are those of `transformers`, the default model knows Paris."""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from tests.models import test_families as families
from tests.models import test_qwen_v1 as qwen
from tests.models.qwen_v1_reference import QwenV1
from tests.tiny_models import write_tiny_qwen_v1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
models = families.models
LENGTHS = (1, 5, 23, 33, 60)
CHUNKS = {"max_num_batched_tokens": 24, "max_num_seqs": 4}
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def answers(path, count, options):
    memory = {"kv_cache_memory": "4MiB", "max_model_len": 80}
    engine = Engine.build(EngineOptions(model=str(path), device="cuda", dtype="float32", **memory | options))
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    for length in LENGTHS:
        engine.add(Request(str(length), families.prompt(length, length), params))
    found = {length: [] for length in LENGTHS}
    while engine.has_work():
        for name, _, token, *_ in engine.step().tokens:
            found[int(name)].append(token)
    return found


@pytest.mark.parametrize("options", [{}, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", families.CASES)
def test_the_tokens_are_those_of_transformers(models, name, options):
    path, reference = models(name)
    # In the reference, this one's angles are those of the length so far, and the keys those of former lengths.
    count = 1 if name == "dynamic" else 12
    for length, answer in answers(path, count, options).items():
        assert len(answer) == count
        assert answer == families.greedy(reference, families.prompt(length, length), answer)


@pytest.mark.parametrize("options", [{}, CHUNKS], ids=["whole", "chunks"])
def test_qwen_v1_with_a_base_and_a_scale_by_length(tmp_path, options):
    path = write_tiny_qwen_v1(tmp_path, seq_length=32, max_position_embeddings=256)
    reference = QwenV1(path)
    for length, answer in answers(path, 8, options).items():
        assert answer == qwen.greedy(reference, families.prompt(length, length))


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"deterministic": True}], ids=str)
def test_the_default_model_knows_paris(smollm2_path, options):
    llm = LLM(str(smollm2_path), device="cuda", max_model_len=2048, kv_cache_memory="512MiB", **options)
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=24)
    first, *again = [llm.chat([PARIS, PARIS], [greedy, drawn], use_tqdm=False) for _ in range(3)]
    assert "Paris" in first[0].outputs[0].text
    assert first[0].outputs[0].finish_reason == "stop"
    for outputs in again:
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in first]
