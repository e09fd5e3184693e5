"""Whether the cache will hold what is admitted, not only now but when the running answers have grown.

Admitting whatever fits this moment means preempting it soon after: measured, two thirds of the work done twice
(docs/decisions/0001). So the highest number of tokens that the running sequences will hold together is estimated, from
what they must and may still generate, and from how long answers have been lately and whether it was their limit that
ended them. Knows no order.
"""

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Ints
from octavo.engine.decoding import Growth
from octavo.engine.registry import Registry
from octavo.engine.state import RequestState

# Of the mean answer's length, how much more each running sequence is expected to grow before others make room, where
# answers end by themselves: one would leave the batch a third smaller there, a quarter is the measured compromise.
# Where they all reach their limits it is one.
SHARE_OF_MEAN = 0.25
FIRST_GUESS = 256.0  # tokens of an answer, before any has ended
MEMORY = 0.05  # weight of the newest answer in the moving means
# What a step costs whoever is in it, in the cost of a token: the tokens of prompts that are computed in the time of a
# step of one row, measured (docs/decisions/0001).
TOKENS_OF_A_STEP = {"cpu": 30, "cuda": 250}


class Forecast:
    """Moving means of answer lengths, and the peak of memory that follows from them."""

    def __init__(self, max_rows: int, tokens_of_a_step: int) -> None:
        self._max_rows = max_rows
        self._tokens_of_a_step = tokens_of_a_step
        self._mean = FIRST_GUESS
        self._limited = 0.0  # of lengths, those of answers that ended before their limit counted as 0

    def ended(self, num_output: int, at_limit: bool) -> None:
        """Takes in the length of an answer that has ended, and whether that was all it could get."""
        self._mean += MEMORY * (num_output - self._mean)
        self._limited += MEMORY * (num_output * at_limit - self._limited)

    @property
    def growth(self) -> float:
        """Tokens that a sequence is expected to grow before others make room, if it may.

        The share of the mean goes from `SHARE_OF_MEAN` to one with the part of all tokens that belong to answers which
        reached their limit: not of all answers, or those that may have a few tokens would speak for those that may have
        many.
        """
        return SHARE_OF_MEAN * self._mean + (1 - SHARE_OF_MEAN) * self._limited

    def pays_anyway(self, num_tokens: int, rows: int) -> bool:
        """Whether a request of `num_tokens` beside `rows` rows is worth its place even if it has to give way later.

        Until then it draws about an answer's tokens, each of which costs a token and saves a row's part of a step. Then
        all that is known of it is computed again.
        """
        return self._mean * (self._tokens_of_a_step / max(1, rows) - 1) > num_tokens

    def fits(self, state: RequestState, requests: Registry, owned_hits: int) -> bool:
        """Whether the running requests will probably not have to give way soon if `state` joins them.

        `owned_hits` blocks of its prompt are held by running requests already.
        """
        blocks, size = requests.blocks, requests.blocks.block_size
        joining = sum(blocks.blocks_for(seq.num_tokens) for seq in state.sequences) - owned_hits
        most = self._max_rows * (self.growth + size) + requests.must_grow + state.must_grow  # each ends within a block
        if (blocks.num_owned + joining) * size + most <= blocks.num_blocks * size:
            return True  # even if there were as many rows as there may be
        own = Growth.of(state.growth([blocks.blocks_for(seq.num_tokens) for seq in state.sequences]))
        running = requests.growth()
        shared = blocks.num_owned - int(running.held.sum())  # by sequences whose first owner has ended
        own.held[0] += shared - owned_hits
        held, may_grow, must_grow = map(np.concatenate, zip(running, own, strict=True))
        if self.pays_anyway(sum(seq.num_tokens for seq in state.sequences), len(running.held)):
            remainder = np.minimum(may_grow, SHARE_OF_MEAN * self._mean)
        else:
            remainder = np.maximum(must_grow, np.minimum(may_grow, self.growth))
        return peak(held * size, np.ceil(remainder / size) * size) <= blocks.num_blocks * size


def peak(held: Ints, remainder: NDArray[np.float64]) -> int:
    """The most tokens held at once, for sequences that hold `held` tokens and will grow by `remainder`.

    Sequences end in the order of what they still have to generate; just before one ends, it and all that outlive it
    have grown by its remainder.

        remainders, longest first   r0 >= r1 >= r2        peak = max over k of  sum(held[0..k]) + (k + 1) * rk
    """
    longest_first = np.argsort(-remainder, kind="stable")
    sums = np.cumsum(held[longest_first])
    return int(np.max(sums + np.arange(1, len(held) + 1) * remainder[longest_first]))
