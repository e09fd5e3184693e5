"""Tiny random models: written by `transformers`, read back through a small checkpoint over `safetensors`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from octavo.checkpoint import TensorInfo
from octavo.models import read_config
from octavo.models.loader import load_model
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner

CPU = torch.device("cpu")


class FolderCheckpoint:
    """The `Checkpoint` protocol over a folder with config.json and model.safetensors."""

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.generation_config: dict[str, Any] = {}
        self.data: dict[str, np.ndarray] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with safe_open(path / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                self.put(name, file.get_tensor(name))

    def put(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        data.flags.writeable = False
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
        self.data[name] = data
        self.tensors[name] = TensorInfo(name, kind, tuple(tensor.shape), len(data))

    def drop(self, name: str) -> None:
        del self.data[name], self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        return self.data[name]


def save_llama(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama of 2 layers, width 64, 4 heads on 2, with weights large enough that every part matters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 160,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float32",
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return path


def runner_for(
    checkpoint: FolderCheckpoint,
    block_size: int = 4,
    num_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> ModelRunner:
    model = load_model(checkpoint, read_config(checkpoint.config), dtype, CPU)
    cache = KVCache(model.config, -(-num_tokens // block_size), block_size, dtype, CPU)
    return ModelRunner(model, cache)
