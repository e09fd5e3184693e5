"""Qwen3 (dense): Llama with a norm on each query and key head, and heads whose width is a number of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config import ModelConfig
from octavo.models.family import Family
from octavo.models.hf_config import HFConfig
from octavo.models.qwen2 import windows


class Qwen3(Family):
    """A file that does not give `head_dim` means 128, not the width divided by the heads."""

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        fields = HFConfig(hf)
        config = super().config({**hf, "head_dim": fields.whole("head_dim", 128)})
        bias = fields.flag("attention_bias")
        return replace(config, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=windows(hf, config.num_layers))
