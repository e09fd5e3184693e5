"""Tiny random models: written by `transformers`, read back through a small checkpoint over `safetensors`.

Qwen v1, which `transformers` does not have, is written here as its own repositories are laid out.
"""

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

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
    return save_model(path, "Llama", seed, **changes)


def save_model(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A model of 2 layers, width 64, 4 heads on 2, with weights large enough that every part matters.

    `family` is how `transformers` begins its class names.
    """
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
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
    model = getattr(transformers, f"{family}ForCausalLM")(config)
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


QWEN_V1: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 256,  # of w1 and w2 together
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "use_flash_attn": "auto",
}
# What a tiny vocabulary learns its merges from.
_PRIMER = """The quick brown fox jumps over the lazy dog. You are a helpful assistant. Who are you? Where is Beijing?
def main():\n    return [i for i in range(100)]  # the first hundred\n<|im_start|> user assistant system hello world
浙江的省会在哪里？这有什么好吃的？你好，我是一个人工智能助手。很高兴认识你！北京是中国的首都。"""


def train_ranks(text: str = _PRIMER, num_merges: int = 100) -> list[bytes]:
    """Byte-pair ranks as a `.tiktoken` file has them: all 256 bytes, then what is most frequent in `text`."""
    ranks = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in text.replace(" ", "\0 ").split("\0")]
    for _ in range(num_merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], -len(b"".join(item[0])), item[0]))
        if left + right not in ranks:
            ranks.append(left + right)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    return ranks


def write_tiny_qwen_v1(path: Path, *, chat: bool = True, seed: int = 0, **changes: Any) -> Path:
    """A random Qwen v1 in the folder `path`, laid out as the model's own repositories; `changes` go into config.json.

    As in the real one, the special tokens' ids follow the ranks: endoftext, im_start, im_end, extra_0 to
    extra_204, and the matrices have some rows more, which stand for no token.
    """
    path.mkdir(parents=True, exist_ok=True)
    ranks = train_ranks()
    end = len(ranks)
    config = {**QWEN_V1, "vocab_size": -(-(end + 208) // 64) * 64, **changes}
    generation = {
        "chat_format": "chatml" if chat else "raw",
        "eos_token_id": end,
        "pad_token_id": end,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
    }
    settings = {"model_max_length": config.get("max_position_embeddings"), "tokenizer_class": "QWenTokenizer"}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
    ):
        (path / name).write_text(json.dumps(content, indent=2))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (path / "qwen.tiktoken").write_text("".join(lines))
    save_file(qwen_v1_tensors(config, seed), path / "model.safetensors", {"format": "pt"})
    return path


def qwen_v1_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights by Qwen v1's names, large enough that every part matters."""
    torch.manual_seed(seed)
    D, F = config["hidden_size"], config["intermediate_size"] // 2
    E = config["kv_channels"] * config["num_attention_heads"]
    layer = {"attn.c_attn.weight": (3 * E, D), "attn.c_attn.bias": (3 * E,), "attn.c_proj.weight": (D, E)}
    layer |= {"mlp.w1.weight": (F, D), "mlp.w2.weight": (F, D), "mlp.c_proj.weight": (D, F)}
    layer |= {"ln_1.weight": (D,), "ln_2.weight": (D,)}
    shapes = {"transformer.wte.weight": (config["vocab_size"], D), "lm_head.weight": (config["vocab_size"], D)}
    shapes |= {f"transformer.h.{i}.{k}": v for i in range(config["num_hidden_layers"]) for k, v in layer.items()}
    shapes["transformer.ln_f.weight"] = (D,)
    tensors = {name: torch.randn(shape) * (0.15 if len(shape) == 2 else 0.3) for name, shape in shapes.items()}
    return {name: tensor + 1 if ".ln_" in name else tensor for name, tensor in tensors.items()}
