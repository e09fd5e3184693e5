"""Sampling flags of the commands that write answers in this process."""

from dataclasses import dataclass
from typing import Any

from octavo.config import option

_ADVISED = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(slots=True)
class SamplingOptions:
    """What a user may choose about answers. `None` leaves it to what the model's makers advise."""

    max_tokens: int | None = option(None, "longest answer in tokens; up to the context's end by default")
    temperature: float | None = option(None, "0 always takes the likeliest token (default: the model's, or 1)")
    top_p: float | None = option(
        None, "draw from the likeliest tokens that hold this share (default: the model's, or 1)"
    )
    top_k: int | None = option(None, "draw from this many likeliest tokens (default: the model's, or all)")
    repetition_penalty: float | None = option(None, "above 1 discourages repetition (default: the model's, or 1)")
    sampling_seed: int | None = option(None, "makes answers repeatable")

    def given(self) -> dict[str, Any]:
        """The sampling parameters that were chosen."""
        chosen = {name: value for name in _ADVISED if (value := getattr(self, name)) is not None}
        return {"max_tokens": self.max_tokens, "seed": self.sampling_seed, **chosen}
