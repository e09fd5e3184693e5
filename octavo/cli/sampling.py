"""Sampling flags of the commands that write answers in this process, and where their defaults come from."""

from dataclasses import dataclass
from typing import Any

from octavo.config import option
from octavo.sampling_params import SamplingParams

_FROM_MODEL = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(slots=True)
class SamplingOptions:
    """What a user may choose about answers. `None` takes what the model's generation_config.json says."""

    max_tokens: int | None = option(None, "longest answer in tokens; up to the context's end by default")
    temperature: float | None = option(None, "0 always takes the likeliest token (default: the model's, or 0.2)")
    top_p: float | None = option(
        None, "draw from the likeliest tokens that hold this share (default: the model's, or 0.9)"
    )
    top_k: int | None = option(None, "draw from this many likeliest tokens (default: the model's, or all)")
    repetition_penalty: float | None = option(None, "above 1 discourages repetition (default: the model's, or 1)")
    sampling_seed: int | None = option(None, "makes answers repeatable")

    def params(self, generation_config: dict[str, Any]) -> SamplingParams:
        """The sampling parameters that result, given the model's own generation_config."""
        values: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9}
        if generation_config.get("do_sample", True):
            values |= {k: v for k in _FROM_MODEL if (v := generation_config.get(k)) is not None}
        values |= {k: v for k in _FROM_MODEL if (v := getattr(self, k)) is not None}
        return SamplingParams(max_tokens=self.max_tokens, seed=self.sampling_seed, **values)
