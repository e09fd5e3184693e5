"""How far results may lie apart that only the order of additions sets apart, on whatever processor and build.

The derivation is `octavo.parity.rounding`: relative to the largest value, by the number of terms. It allows 4 times
what a random walk of roundings comes to; the largest seen is 1.0 times, by any build, over all families and lengths.
"""

import torch

from octavo.config import ModelConfig
from octavo.parity import rounding, terms_of_a_logit

__all__ = ["assert_logits_equal", "of_logits", "rounding"]


def of_logits(model: ModelConfig, context: int, largest: float, count: int = 1) -> float:
    """For a logit at the end of `context` tokens, or the log probability of one; for the sum of `count` of these.

    `largest` is the largest logit's size: a small logit, too, is a sum of large terms.
    """
    return rounding(count * terms_of_a_logit(model, context), largest)


def assert_logits_equal(found_TV: torch.Tensor, wanted_TV: torch.Tensor, model: ModelConfig) -> None:
    """Logits after each token of a sequence, or of several of which none is longer than T; -inf where both have it."""
    tolerance = of_logits(model, len(wanted_TV), float(wanted_TV[wanted_TV.isfinite()].abs().max()))
    torch.testing.assert_close(found_TV.float(), wanted_TV.float(), atol=tolerance, rtol=0)
