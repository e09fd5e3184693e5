"""The decoder: embedding, layers of attention and MLP around a residual stream, a last norm, and the head.

It asks `Weights` for each tensor by the decoder's own words and expected shape, and knows nothing of files,
families, quantization or ranks.

Shapes: T tokens, S rows of logits, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo.config import ModelConfig
from octavo.layers.attention import Attention
from octavo.layers.context import ForwardContext
from octavo.layers.embedding import Embedding
from octavo.layers.mlp import GatedMLP
from octavo.layers.rope import Rope
from octavo.models.weights import Weights

if TYPE_CHECKING:
    import torch


class DecoderLayer:
    """`x` and the residual stream go in and out apart, so that their sum is fused with the next norm."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        D, eps = config.hidden_size, config.norm_eps
        self.attention_norm = weights.norm("attention_norm", D, eps)
        self.attention = attention(config, weights, layer)
        self.mlp_norm = weights.norm("mlp_norm", D, eps)
        self.mlp = GatedMLP(
            gate_up=weights.linear("gate_up", (config.intermediate_size,) * 2, D, config.mlp_bias),
            down=weights.linear("down", (D,), config.intermediate_size, config.mlp_bias),
        )

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD, residual_TD = self.attention_norm.add(x_TD, residual_TD, ctx)
        x_TD = self.attention(x_TD, ctx)
        x_TD, residual_TD = self.mlp_norm.add(x_TD, residual_TD, ctx)
        return self.mlp(x_TD, ctx), residual_TD


def attention(config: ModelConfig, weights: Weights, layer: int) -> Attention:
    H, q_size, kv_size = (
        config.head_dim,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    return Attention(
        qkv=weights.linear("qkv", (q_size, kv_size, kv_size), config.hidden_size, config.qkv_bias),
        o=weights.linear("o", (config.hidden_size,), q_size, config.o_bias),
        layer=layer,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=H,
        q_norm=weights.norm("q_norm", H, config.norm_eps) if config.qk_norm else None,
        k_norm=weights.norm("k_norm", H, config.norm_eps) if config.qk_norm else None,
        sliding_window=config.windows[layer] if config.windows else 0,
    )


class Decoder:
    """A model ready to run. `forward` gives hidden states; `logits` is apart, since few rows need it.

    Weights for the CPU's kernels know no torch, and there is no `device` then.
    """

    def __init__(self, config: ModelConfig, weights: Weights, device: torch.device | None = None):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.device: Any = device
        self.rope = Rope(config.rope, device)
        self.embedding = Embedding(weights.table("embedding", (V, D)))
        self.layers = [DecoderLayer(config, weights.of_layer(i), i) for i in range(config.num_layers)]
        self.norm = weights.norm("norm", D, config.norm_eps)
        self.lm_head = (
            weights.tied_linear("embedding", (V, D), self.embedding.weight_VD)
            if config.tie_word_embeddings
            else weights.linear("lm_head", (V,), D, bias=False)
        )

    def forward(self, ctx: ForwardContext) -> torch.Tensor:
        """Hidden states after the last norm, [T, D]; writes the step's K and V into the context's caches."""
        x_TD, residual_TD = self.embedding(ctx), None
        for layer in self.layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, ctx)
        return self.norm.add(x_TD, residual_TD, ctx)[0]

    def logits(self, hidden_SD: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[S, V] in fp32, for any rows of `forward`'s result; -inf for rows of the head that stand for no token."""
        logits_SV = self.lm_head(hidden_SD, ctx).float()
        if self.config.num_tokens:
            logits_SV[:, self.config.num_tokens :] = float("-inf")
        return logits_SV
