"""Llama 1 to 3 and what shares its shape (SmolLM2, TinyLlama, Mistral without a sliding window)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config import ModelConfig
from octavo.errors import ConfigError
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
    """Llama without biases. A window shorter than the context would attend to fewer keys, and is refused."""

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        config = super().config(hf)
        window = hf.get("sliding_window")
        if window is not None and window < config.max_position:
            raise ConfigError(
                f"config.json: sliding_window is {window}, shorter than max_position_embeddings"
                f" {config.max_position}, which is not supported; set max_position_embeddings to {window}"
            )
        return config
