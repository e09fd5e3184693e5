"""Qwen, the first (QWenLMHeadModel: Qwen-1.8B to 72B, and their chat models): Llama with a bias on q, k and v.

Beyond the trained length the rotary base grows in steps, chosen once per sequence, and queries are scaled by logn.
Source: modeling_qwen.py of the models' own repositories.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from octavo.checkpoint import Checkpoint, tiktoken
from octavo.config import ModelConfig, RopeConfig
from octavo.errors import CheckpointError
from octavo.models.family import LLAMA_NAMES, Family, Names
from octavo.models.hf_config import HFConfig

# Our word for a field -> what the releases called it, the first that is there counts.
_FIELDS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "seq_length"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
}


class Qwen(Family):
    """`intermediate_size` counts gate (`w2`) and up (`w1`) together; `no_bias` leaves out those of c_proj and MLP."""

    names: ClassVar[Names] = {
        **LLAMA_NAMES,
        "embedding": "transformer.wte",
        "norm": "transformer.ln_f",
        "attention_norm": "transformer.h.{i}.ln_1",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "o": "transformer.h.{i}.attn.c_proj",
        "mlp_norm": "transformer.h.{i}.ln_2",
        "gate_up": ("transformer.h.{i}.mlp.w2", "transformer.h.{i}.mlp.w1"),
        "down": "transformer.h.{i}.mlp.c_proj",
    }

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        fields = HFConfig(hf)
        renamed = {
            ours: next((hf[name] for name in theirs if hf.get(name) is not None), None)
            for ours, theirs in _FIELDS.items()
        }
        dtype = next((name for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")) if hf.get(flag)), None)
        common = {"dtype": dtype or hf.get("torch_dtype") or "bfloat16", **renamed}
        config = super().config({**hf, **common})
        trained, ntk = fields.whole("seq_length", config.max_position), fields.flag("use_dynamic_ntk", True)
        bias = not fields.flag("no_bias", True)
        return replace(
            config,
            intermediate_size=config.intermediate_size // 2,
            max_position=max(trained, config.max_position) if ntk else trained,
            rope=RopeConfig(
                theta=config.rope.theta,
                rotary_dim=config.rope.rotary_dim,
                scaling="qwen_ntk" if ntk else "none",
                original_max_position=trained,
                logn_length=trained if fields.flag("use_logn_attn", True) else 0,
            ),
            qkv_bias=True,
            o_bias=bias,
            mlp_bias=bias,
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelConfig:
        """Besides the configuration: which ids stand for tokens, and which of them end an answer."""
        model = super().of(checkpoint)
        ranks = checkpoint.path / tiktoken.FILE_NAME
        if not ranks.is_file():
            return model
        end = len(tiktoken.read_ranks(ranks))
        num_tokens = end + len(tiktoken.SPECIAL_TOKENS)
        if num_tokens > model.vocab_size:
            raise CheckpointError(
                f"{ranks} and the special tokens have {num_tokens} ids, but config.json gives vocab_size"
                f" {model.vocab_size}; one of the two belongs to another model"
            )
        ends = tiktoken.end_ids(end, checkpoint.generation_config)
        return replace(model, num_tokens=num_tokens, eos_token_ids=tuple(dict.fromkeys((*ends, *model.eos_token_ids))))
