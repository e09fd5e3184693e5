"""What families to come need of the decoder: norms on q and k, bias on qkv alone, fused, renamed tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.models.decoder import Decoder
from octavo.models.family import LLAMA_NAMES
from octavo.models.llama import Llama
from octavo.models.loader import CheckpointTensors, load_model
from octavo.models.weights import Weights
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from tests.models.test_llama import all_logits
from tests.steps import Row
from tests.tiny_models import CPU, FolderCheckpoint, runner_for, save_llama

TOKENS = [5, 9, 100, 7, 30, 31, 32, 8]
TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "head_dim": 16,
}


@pytest.mark.parametrize(("family", "trait"), [("Qwen3", "qk_norm"), ("Qwen2", "qkv_bias")])
def test_traits_of_other_families(tmp_path: Path, family: str, trait: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    config = replace(Llama.config({**checkpoint.config, "architectures": ["LlamaForCausalLM"]}), **{trait: True})
    decoder = load_model(checkpoint, config, torch.float32, CPU)
    runner = ModelRunner(decoder, KVCache(config, 32, 4, torch.float32, CPU))
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert (all_logits(runner, Row(TOKENS)) - expected).abs().max() < 1e-4


def test_fused_and_renamed_tensors(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(save_llama(tmp_path))
    expected = all_logits(runner_for(checkpoint), Row(TOKENS))
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn"
        parts = [torch.from_numpy(checkpoint.read(f"{stem}.{x}_proj.weight").copy()) for x in "qkv"]
        checkpoint.put(f"h.{layer}.c_attn.weight", torch.cat(parts).view(torch.float32).view(128, 64))
        for x in "qkv":
            checkpoint.drop(f"{stem}.{x}_proj.weight")
    names = {**LLAMA_NAMES, "qkv": "h.{i}.c_attn"}
    config = Llama.config(checkpoint.config)
    source = CheckpointTensors(checkpoint, torch.float32, CPU)
    decoder = Decoder(config, Weights(source, names), CPU)
    source.check_all_taken(set())
    runner = ModelRunner(decoder, KVCache(config, 32, 4, torch.float32, CPU))
    assert torch.equal(all_logits(runner, Row(TOKENS)), expected)
