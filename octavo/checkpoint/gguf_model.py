"""What a GGUF file means: a configuration and tensor names in Hugging Face's words, rows in Hugging Face's
order.

An architecture is one entry of `ARCHITECTURES`; keys and tensor names that it shares with the others stand
once. Quantized bytes pass through as they are: nothing is dequantized here.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint.gguf import GgufFile
from octavo.checkpoint.mapped import release
from octavo.checkpoint.types import TensorInfo, TokenizerData
from octavo.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of `general.architecture`.

    `name` is Hugging Face's class; `permuted` is true when llama.cpp's converter reordered the rows of Q and
    K for its interleaved rotary embedding; `config` holds entries of config.json that follow from the name
    alone.
    """

    name: str
    permuted: bool
    config: Mapping[str, Any]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", True, {}),
    "qwen2": Architecture("Qwen2ForCausalLM", False, {}),
    "qwen3": Architecture("Qwen3ForCausalLM", False, {}),
}

_CONTROL = 3  # a value of tokenizer.ggml.token_type
# Control tokens that end an answer whatever a file names its EOS, since files often name the wrong one; llama.cpp knows
# them by their texts, too.
_ENDS = frozenset(
    (
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
        *("<|return|>", "<|call|>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)

# Keys that are read, those of an architecture without its prefix -> what their values must be, see `_IS`.
_TYPES = {
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "rope.scaling.type"), "a text"),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), "an array of texts"),
    "tokenizer.ggml.token_type": "an array of integers",
    "tokenizer.ggml.scores": "an array of numbers",
    **dict.fromkeys(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"), "true or false"),
    **{
        f"tokenizer.ggml.{name}_token_id": "an integer of at least 0"
        for name in ("bos", "eos", "eot", "eom", "unknown")
    },
    **dict.fromkeys(("expert_count", "rope.dimension_count", "attention.key_length"), "an integer of at least 0"),
    **dict.fromkeys(("attention.sliding_window", "rope.scaling.original_context_length"), "an integer of at least 0"),
    **dict.fromkeys(("rope.freq_base", "rope.scaling.factor", "rope.scale_linear"), "a finite number"),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast"), "a finite number"),
    "rope.scaling.yarn_beta_slow": "a finite number",
}
_IS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "an integer of at least 0": lambda value: type(value) is int and 0 <= value < 1 << 32,
    "a finite number": lambda value: type(value) in (int, float) and math.isfinite(value),
    "an array of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "an array of integers": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
    "an array of numbers": lambda value: isinstance(value, list) and all(type(item) in (int, float) for item in value),
}

# Key without its architecture's prefix -> entry of config.json.
_CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Factors on the rotary frequencies; they go into the configuration.
_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint:
    """A GGUF file as a `Checkpoint`.

    Raises `CheckpointError` for an architecture or an option that is not built.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = GgufFile(path)
        self._metadata = self._file.metadata
        self._prefix = self._metadata.get("general.architecture", "")
        if not isinstance(self._prefix, str) or self._prefix not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{path} has architecture {self._prefix!r}; Octavo reads GGUF files of {known}")
        self._architecture = ARCHITECTURES[self._prefix]
        self._check_types()
        self._stored_names = {self._translate(name): name for name in self._file.tensors if name != _ROPE_FACTORS}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.dtype, tensor.shape, tensor.num_bytes)
            for name, stored in self._stored_names.items()
            for tensor in (self._file.tensors[stored],)
        }
        self.config: dict[str, Any] = self._read_config()
        self.generation_config: dict[str, Any] = self._read_generation_config()

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, flat, rows in [out, in] order:

        a view, or a copy where rows were permuted.
        """
        stored = self._stored_names[name]
        data = self._file.read(stored)
        found = re.search(r"\.attn_([qk])\.(weight|bias)$", stored)
        if found is None or not self._architecture.permuted:
            return data
        heads = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
        # A head's rows lie as (pair, half); Hugging Face keeps (half, pair). Whole rows move, whatever their
        # type.
        num_rows = self.tensors[name].shape[0]
        if not len(data) or num_rows % (2 * self.config[heads]):
            raise CheckpointError(f"{self.path} gives {stored} {num_rows} rows for {self.config[heads]} heads")
        rows = data.reshape(self.config[heads], -1, 2, len(data) // num_rows)
        copy = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
        release(data)
        return copy

    def tokenizer_data(self) -> TokenizerData:
        """What the file says about its tokenizer."""
        metadata = {key: value for key, value in self._metadata.items() if key.startswith("tokenizer.")}
        if "tokenizer.ggml.tokens" not in metadata:
            raise CheckpointError(f"{self.path} holds no tokenizer; name one with the option tokenizer")
        return TokenizerData(self.path, ggml=metadata, generation_config=self.generation_config)

    def _translate(self, stored: str) -> str:
        if stored in _GLOBAL_NAMES:
            return _GLOBAL_NAMES[stored]
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
        if found is None or found[2] not in _LAYER_NAMES:
            raise CheckpointError(
                f"{self.path} holds tensor {stored!r}, which Octavo does not know in a model of architecture "
                f"{self._prefix!r}; without it the answers would be wrong"
            )
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"

    def _check_types(self) -> None:
        """Here alone, so that nobody who reads a value meets another type."""
        for key, wanted in _TYPES.items():
            key = key if key.startswith("tokenizer.") else f"{self._prefix}.{key}"
            value = self._metadata.get(key)
            if value is not None and not _IS[wanted](value):
                raise CheckpointError(
                    f"{self.path} gives {key} as {value!r:.200}; it must be {wanted}: convert the model again"
                )

    def _key(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._prefix}.{key}", default)

    def _required(self, key: str) -> Any:
        value = self._key(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None or isinstance(value, list):
            what = "lacks" if value is None else "has different values a layer for"
            raise CheckpointError(f"{self.path} {what} {self._prefix}.{key}; convert the model again")
        if not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(
                f"{self.path} gives {self._prefix}.{key} as {value!r}; it must be a positive number: convert it again"
            )
        return value

    def _read_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"architectures": [self._architecture.name], "model_type": self._prefix}
        config |= self._architecture.config
        config |= {entry: self._required(key) for key, entry in _CONFIG_KEYS.items()}
        if self._key("expert_count", 0):
            raise CheckpointError(f"{self.path} is a mixture of experts; Octavo reads dense GGUF models")
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} lacks tensor 'token_embd.weight'; it is not a whole model")
        if len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.path} gives tensor 'token_embd.weight' the shape {list(embedding.shape)}; it must be a matrix"
            )
        heads = config["num_attention_heads"]
        has_kv_heads = self._key("attention.head_count_kv") is not None
        default_width = self._key("rope.dimension_count", config["hidden_size"] // heads)
        config |= {
            "num_key_value_heads": self._required("attention.head_count_kv") if has_kv_heads else heads,
            "head_dim": self._key("attention.key_length", default_width),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "hidden_act": "silu",
            "rope_theta": self._key("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(config["max_position_embeddings"]),
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if window := self._key("attention.sliding_window"):
            config["sliding_window"] = window
        return config

    def _rope_scaling(self, context_length: int) -> dict[str, Any] | None:
        """config.json's `rope_scaling`;

        for Llama 3's files the factors themselves, as a list of H / 2 floats.
        """
        kind = self._key("rope.scaling.type", "none")
        if (factors := self._file.tensors.get(_ROPE_FACTORS)) is not None:
            values = self._file.read(_ROPE_FACTORS).view("<f4").tolist() if factors.dtype == "F32" else []
            if not values or kind not in ("none", "linear") or self._key("rope.scaling.factor", 1.0) != 1.0:
                raise CheckpointError(
                    f"{self.path} has rope_freqs.weight of type {factors.dtype} beside RoPE scaling "
                    f"{kind!r}; "
                    "F32 factors alone are understood"
                )
            return {"rope_type": "freq_factors", "factors": values}
        factor = self._key("rope.scaling.factor", self._key("rope.scale_linear", 1.0))
        if kind == "none" and factor not in (0.0, 1.0):
            kind = "linear"
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None
        if kind != "yarn":
            raise CheckpointError(f"{self.path} has RoPE scaling {kind!r}; Octavo reads none, linear, yarn")
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._key("rope.scaling.original_context_length", context_length),
            "beta_fast": self._key("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._key("rope.scaling.yarn_beta_slow", 1.0),
        }
        if (attention := self._key("rope.scaling.attn_factor", 1.0)) != 1.0 and factor > 0:
            # llama.cpp multiplies YaRN's own factor by this one; Hugging Face writes the product.
            scaling["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
        return scaling

    def _read_generation_config(self) -> dict[str, Any]:
        """The tokens that end an answer: those that are named so, and control tokens that models end a turn with."""
        ends = [self._metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        tokens = self._metadata.get("tokenizer.ggml.tokens") or []
        types = self._metadata.get("tokenizer.ggml.token_type") or []
        control = (i for i, kind in enumerate(types) if kind == _CONTROL and i < len(tokens))
        ends += [i for i in control if tokens[i] in _ENDS]
        return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
