"""What sets a model family apart: how its config.json reads, and what its tensors are called.

`names` maps the decoder's words to the checkpoint's names, without `.weight` and `.bias`; `{i}` is the
layer's number. A tuple is stored in parts that the decoder wants side by side, a string in one piece. No
torch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from octavo.checkpoint import Checkpoint
from octavo.config import ModelConfig
from octavo.models.hf_config import HFConfig

Names = Mapping[str, str | tuple[str, ...]]

# What Llama called them, and most families after it.
LLAMA_NAMES: Names = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "model.layers.{i}.input_layernorm",
    "qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "o": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate_up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "down": "model.layers.{i}.mlp.down_proj",
}


class Family:
    """A family overrides what differs: the names, the configuration's reading, or a single word of either."""

    names: ClassVar[Names] = LLAMA_NAMES

    @classmethod
    def config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """config.json in the words that most families share; biases are off unless a family sets them."""
        config = HFConfig(hf)
        num_heads = config.whole("num_attention_heads")
        head_dim = config.head_dim(num_heads)
        rope, max_position = config.rope(head_dim, config.whole("max_position_embeddings"))
        config.choice("hidden_act", "silu", ("silu", "swish"))
        vocab_size = config.whole("vocab_size")
        return ModelConfig(
            architecture=hf["architectures"][0],
            vocab_size=vocab_size,
            hidden_size=config.whole("hidden_size"),
            intermediate_size=config.whole("intermediate_size"),
            num_layers=config.layers(),
            num_heads=num_heads,
            num_kv_heads=config.kv_heads(num_heads),
            head_dim=head_dim,
            max_position=max_position,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=config.flag("tie_word_embeddings"),
            dtype=config.dtype(),
            bos_token_id=config.token_id("bos_token_id"),
            eos_token_ids=_drawable(config.token_ids("eos_token_id"), vocab_size),
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelConfig:
        """The whole model: config.json, and every token that ends an answer (generation_config.json may name more)."""
        model = cls.config(checkpoint.config)
        ends = HFConfig(checkpoint.generation_config).token_ids("eos_token_id")
        ends = _drawable((*model.eos_token_ids, *ends), model.vocab_size)
        return replace(model, eos_token_ids=tuple(dict.fromkeys(ends)))


def _drawable(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Those of `ids` that have a row in the head: files write -1 for none, or name tokens that were never trained."""
    return tuple(index for index in ids if 0 <= index < vocab_size)
