"""Llama 1 to 3 and what shares its shape (SmolLM2, TinyLlama, Mistral)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config import ModelConfig
from octavo.models.family import Family
from octavo.models.hf_config import HFConfig


class Llama(Family):
    """`attention_bias` puts a bias on q, k, v and o; `mlp_bias` on all three products of the MLP."""

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        fields = HFConfig(hf)
        attention_bias = fields.flag("attention_bias")
        return replace(
            super().config(hf),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias"),
        )


class Mistral(Family):
    """Llama without biases; the first release looks back over a window in every layer."""

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        config = super().config(hf)
        window = HFConfig(hf).whole("sliding_window", config.max_position)
        if window >= config.max_position:
            return config
        return replace(config, windows=(window,) * config.num_layers)
