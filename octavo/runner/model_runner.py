"""One step on one device: a Batch goes through the model and the sampler and comes out as a StepResult.

It keeps weights and the KV cache and nothing else: no requests, no state from step to step.

Shapes: T tokens, D model width, S samples.
"""

import numpy as np
import torch

from octavo import ops
from octavo.batch import Batch, Ints, LogprobColumns, SamplingColumns, StepResult
from octavo.models.decoder import Decoder
from octavo.ops.transfer import on_device
from octavo.runner import sampler
from octavo.runner.forward import PlainForward
from octavo.runner.kv_cache import KVCache

# Logits that are drawn from at once: sorting and masking them takes more than ten times as much memory.
_LOGITS_AT_ONCE = 2**24


class ModelRunner:
    """Runs `model` over `kv_cache`, both on the model's device, op by op."""

    def __init__(self, model: Decoder, kv_cache: KVCache):
        self.model = model
        self.kv_cache = kv_cache
        self.device = model.device
        self.layout = f"torch on {self.device.type}"
        self.ops = ops.for_device(self.device)
        self.forward = PlainForward(model, kv_cache, self.ops)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Copies blocks, computes the step's tokens, draws the samples."""
        batch.check_ids(self.model.config.vocab_size)
        self.kv_cache.move_blocks(batch, self.ops)
        hidden_TD = self.forward.hidden(batch)
        result = StepResult(token_ids=np.empty(0, np.int32))
        if batch.prompt_logprobs is not None and len(batch.prompt_logprobs.target):
            result.prompt_logprobs = sampler.prompt_logprobs(
                lambda index: self.forward.logits(hidden_TD[on_device(index, self.device)]), batch.prompt_logprobs
            )
        if len(batch.sample_index):
            result.token_ids, result.logprobs = self._samples(hidden_TD, batch)
        return result

    def _samples(self, hidden_TD: torch.Tensor, batch: Batch) -> tuple[Ints, LogprobColumns | None]:
        """Draws all samples, so many at a time that logits and what is made of them stay small."""
        step = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
        count = len(batch.sample_index)
        parts = [
            self._draw_samples(
                hidden_TD, batch.sample_index[i : i + step], batch.sampling.part(i, min(i + step, count))
            )
            for i in range(0, count, step)
        ]
        found = [each.columns() for _, each in parts if each is not None]
        return (
            np.concatenate([tokens for tokens, _ in parts]),
            LogprobColumns.spread(found, batch.sampling) if found else None,
        )

    def _draw_samples(
        self, hidden_TD: torch.Tensor, sample_index: Ints, columns: SamplingColumns
    ) -> tuple[Ints, sampler.Found | None]:
        # The n samples of a prompt share one row of logits until they are changed.
        index, inverse = np.unique(sample_index, return_inverse=True)
        logits_SV = self.forward.logits(hidden_TD[on_device(index, self.device)])
        if len(index) < len(inverse) or (np.diff(inverse) != 1).any():
            logits_SV = logits_SV[on_device(inverse, self.device)]
        tokens_S, found = sampler.sample(logits_SV, columns)
        return tokens_S.int().cpu().numpy(), found
