"""Configurations of models and engines that nobody loads, for what only counts and decides. No torch."""

from dataclasses import fields
from typing import Any

from octavo.config import EngineConfig, EngineOptions, ModelConfig, RopeConfig


def model_config(**changes: Any) -> ModelConfig:
    """A model of one narrow layer; its rotary width follows its heads'."""
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 1000,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_position": 4096,
        "norm_eps": 1e-6,
        **changes,
    }
    return ModelConfig(**{"rope": RopeConfig(rotary_dim=values["head_dim"]), **values})


def engine_config(model: ModelConfig | None = None, **changes: Any) -> EngineConfig:
    """An engine of small limits on a CPU, around `model` or the tiny one; options of a user may be among `changes`."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "kv_dtype": "float32",
        "weights": "plain",
        "device": "cpu",
        "max_model_len": 256,
        "block_size": 4,
        "num_blocks": 64,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "seed": 0,
        **changes,
    }
    settled = {field.name for field in fields(EngineConfig)}
    options = EngineOptions(**{name: values.pop(name) for name in values.keys() - settled})
    return EngineConfig(model=model or model_config(), options=options, **values)
