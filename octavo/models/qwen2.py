"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and perhaps a sliding window in its upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config import ModelConfig
from octavo.models.family import Family
from octavo.models.hf_config import HFConfig, wrong


class Qwen2(Family):
    """`sliding_window` counts only where `use_sliding_window` says so, from layer `max_window_layers` on."""

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        config = super().config(hf)
        return replace(config, qkv_bias=True, windows=windows(hf, config.num_layers))


def windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """`ModelConfig.windows` as Qwen2's and Qwen3's files describe it."""
    fields = HFConfig(hf)
    if not fields.flag("use_sliding_window") or hf.get("sliding_window") is None:
        return ()
    window = fields.whole("sliding_window")
    kinds = hf.get("layer_types")
    if kinds is None:
        first = fields.count("max_window_layers", 28)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise wrong("layer_types", kinds, f"a list of {num_layers} times full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
