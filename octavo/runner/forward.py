"""A model's part of a step: tokens to hidden states, hidden states to logits, one call of torch after another.

The way that always works, and the oracle for `step_graph`, which replays recorded kernels instead.

Shapes: T tokens, S rows, D model width, V vocabulary.
"""

import torch

from octavo.batch import Batch
from octavo.layers.context import ForwardContext
from octavo.models.decoder import Decoder
from octavo.ops import Ops
from octavo.runner.kernel_cache import KernelCache
from octavo.runner.kv_cache import KVCache


class PlainForward:
    """Runs the model's own code with the ops of its device. What comes back may lie in memory that the next call of the
    same method writes to."""

    def __init__(self, model: Decoder, kv_cache: KVCache | KernelCache, ops: Ops):
        self._model = model
        self._kv_cache = kv_cache
        self._ops = ops
        self._ctx: ForwardContext | None = None

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Computes the batch's tokens, writing their K and V into the cache: hidden states, [T, D]."""
        model = self._model
        self._ctx = ForwardContext.build(batch, self._kv_cache.layers, model.rope, self._ops, model.device)
        return model.forward(self._ctx)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits of any rows of the last `hidden`, [S, V] in fp32; may be written into."""
        assert self._ctx is not None, "logits are those of a step's hidden states"
        return self._model.logits(hidden_SD, self._ctx)
