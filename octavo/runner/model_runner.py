"""One step on one device: a Batch goes through the model and the sampler and comes out as a StepResult.

It keeps weights and the KV cache and nothing else: no requests, no state from step to step.

Shapes: T tokens, D model width, S samples, E prompt positions.
"""

import numpy as np
import torch

from octavo import ops
from octavo.batch import Batch, LogprobColumns, PromptLogprobs, StepResult
from octavo.layers.context import ForwardContext, on_device
from octavo.models.decoder import Decoder
from octavo.runner import sampler
from octavo.runner.kv_cache import KVCache

# Prompt positions whose logits are alive at once: a chunk's worth for a large vocabulary would be gigabytes.
_PROMPT_LOGPROBS_AT_ONCE = 256


class ModelRunner:
    """Runs `model` over `kv_cache`, both on the model's device."""

    def __init__(self, model: Decoder, kv_cache: KVCache):
        self.model = model
        self.kv_cache = kv_cache
        self.device = model.device
        self.ops = ops.for_device(self.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Copies blocks, computes the step's tokens, draws the samples."""
        self.kv_cache.copy_blocks(batch.block_copies, self.ops)
        ctx = ForwardContext.build(batch, self.kv_cache.layers, self.model.rope, self.ops, self.device)
        hidden_TD = self.model.forward(ctx)
        result = StepResult(token_ids=np.empty(0, np.int32))
        if batch.prompt_logprobs is not None and len(batch.prompt_logprobs.target):
            result.prompt_logprobs = self._prompt_logprobs(hidden_TD, batch.prompt_logprobs, ctx)
        if len(batch.sample_index):
            # The n samples of a prompt share one row of logits until they are changed.
            index, inverse = np.unique(batch.sample_index, return_inverse=True)
            logits = self.model.logits(hidden_TD[on_device(index, self.device)], ctx)
            logits_SV = logits[on_device(inverse, self.device)]
            tokens_S, result.logprobs = sampler.sample(logits_SV, batch.sampling)
            result.token_ids = tokens_S.int().cpu().numpy()
        return result

    def _prompt_logprobs(self, hidden_TD: torch.Tensor, asked: PromptLogprobs, ctx: ForwardContext) -> LogprobColumns:
        k = int(asked.num_logprobs.max())
        parts = []
        for start in range(0, len(asked.target), _PROMPT_LOGPROBS_AT_ONCE):
            part = slice(start, start + _PROMPT_LOGPROBS_AT_ONCE)
            logits = self.model.logits(hidden_TD[on_device(asked.token_index[part], self.device)], ctx)
            targets = on_device(asked.target[part], self.device).long()
            parts.append(sampler.logprobs(logits, targets, k))
        return LogprobColumns(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            rank=np.concatenate([part.rank for part in parts]),
        )
