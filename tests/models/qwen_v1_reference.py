"""Qwen v1 written down from its description alone, for tests: no cache, no chunks, one sequence, fp64.

It shares no code with Octavo. The whole sequence is computed anew for every token; what a cache would have kept
from the prefill is the NTK factor, so that one argument says how long the prompt was.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


class QwenV1:
    def __init__(self, path: Path):
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}

    def logits(self, tokens: list[int], prompt_len: int) -> torch.Tensor:
        """[tokens, vocabulary] for a sequence that began with a prompt of `prompt_len` tokens."""
        angles = self.angles(len(tokens), prompt_len)
        x = self.weights["transformer.wte.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            stem = f"transformer.h.{layer}"
            x = x + self.attention(stem, self.norm(f"{stem}.ln_1", x), angles)
            x = x + self.mlp(stem, self.norm(f"{stem}.ln_2", x))
        return self.norm("transformer.ln_f", x) @ self.weights["lm_head.weight"].T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]

    def alpha(self, prompt_len: int) -> float:
        """The factor on the rotary base: for each doubling of the trained length the next of 1, 3, 7, 15, ..."""
        if not self.config["use_dynamic_ntk"]:
            return 1
        return max(2 ** math.ceil(math.log(prompt_len / self.config["seq_length"], 2) + 1) - 1, 1)

    def angles(self, length: int, prompt_len: int) -> torch.Tensor:
        """[length, half a head]"""
        d = self.config["kv_channels"]
        base = self.config["rotary_emb_base"] * self.alpha(prompt_len) ** (d / (d - 2))
        frequencies = torch.tensor([base ** (-i / d) for i in range(0, d, 2)], dtype=torch.float64)
        return torch.arange(length, dtype=torch.float64)[:, None] * frequencies

    def logn(self, length: int) -> torch.Tensor:
        trained = self.config["seq_length"]
        factors = [math.log(p) / math.log(trained) if p > trained else 1.0 for p in range(1, length + 1)]
        return torch.tensor(factors, dtype=torch.float64)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config["layer_norm_epsilon"]) * self.weights[f"{name}.weight"]

    def attention(self, stem: str, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        heads, width, length = self.config["num_attention_heads"], self.config["kv_channels"], len(x)
        joined = x @ self.weights[f"{stem}.attn.c_attn.weight"].T + self.weights[f"{stem}.attn.c_attn.bias"]
        q, k, v = (part.view(length, heads, width).transpose(0, 1) for part in joined.split(heads * width, dim=-1))
        q, k = self.rotate(q, angles), self.rotate(k, angles)
        if self.config["use_logn_attn"]:
            q = q * self.logn(length)[None, :, None]
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v
        return out.transpose(0, 1).reshape(length, -1) @ self.weights[f"{stem}.attn.c_proj.weight"].T

    @staticmethod
    def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Rotates a head's first half against its second."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def mlp(self, stem: str, x: torch.Tensor) -> torch.Tensor:
        """w1 carries the value, w2 the gate."""
        gate = x @ self.weights[f"{stem}.mlp.w2.weight"].T
        value = x @ self.weights[f"{stem}.mlp.w1.weight"].T
        return (value * gate * torch.sigmoid(gate)) @ self.weights[f"{stem}.mlp.c_proj.weight"].T
