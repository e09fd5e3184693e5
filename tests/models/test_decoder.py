"""What families to come need of the decoder: fused and renamed tensors."""

from pathlib import Path

import torch

from octavo.models.decoder import Decoder
from octavo.models.family import LLAMA_NAMES
from octavo.models.llama import Llama
from octavo.models.loader import CheckpointTensors
from octavo.models.weights import Weights
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from tests.steps import Row, all_logits
from tests.tiny_models import CPU, FolderCheckpoint, runner_for, save_llama

TOKENS = [5, 9, 100, 7, 30, 31, 32, 8]


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
    source.stored.check_all_taken(config)
    runner = ModelRunner(decoder, KVCache(config, 32, 4, torch.float32, CPU))
    assert torch.equal(all_logits(runner, Row(TOKENS)), expected)
