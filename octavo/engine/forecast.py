"""Whether the cache will hold what is admitted, not only now but when the running answers have grown.

Admitting whatever fits this moment means preempting it soon after: measured, two thirds of the work done twice
(docs/decisions/0001). So the highest number of tokens that the running sequences will hold together is estimated, from
what they may still generate and from how long answers have been lately. Knows no order.
"""

from collections.abc import Callable

import numpy as np

from octavo.engine.block_manager import BlockManager
from octavo.engine.state import RequestState

# Of the mean answer's length, how much more each running sequence is expected to grow before others make room. One
# would avoid nearly all preemptions but leave the batch a third smaller; a quarter is the measured compromise.
SHARE_OF_MEAN = 0.25
FIRST_GUESS = 256.0  # tokens of an answer, before any has ended
MEMORY = 0.05  # weight of the newest answer in the moving mean


class Forecast:
    """A moving mean of answer lengths, and the peak of memory that follows from it."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._mean = FIRST_GUESS

    def ended(self, num_output: int) -> None:
        """Takes in the length of an answer that has ended."""
        self._mean += MEMORY * (num_output - self._mean)

    def fits(
        self,
        state: RequestState,
        running_requests: Callable[[], list[RequestState]],
        blocks: BlockManager,
        owned_hits: int,
    ) -> bool:
        """Whether the running requests will probably not have to give way soon if `state` joins them.

        `owned_hits` blocks of its prompt are held by running requests already.
        """
        block = blocks.block_size
        joining = sum(blocks.blocks_for(seq.num_tokens) for seq in state.sequences)
        growth = self._max_rows * self._mean * SHARE_OF_MEAN
        if (blocks.num_owned + joining) * block + growth <= blocks.num_blocks * block:
            return True  # even if there were as many rows as there may be
        running = running_requests()  # only now, since it may take long to know all of them
        together = [(each, seq) for each in running for seq in each.sequences]
        held = [(len(seq.block_table) - seq.num_borrowed) * block for _, seq in together]
        shared = blocks.num_owned * block - sum(held)  # by sequences whose first owner has ended
        new = [blocks.blocks_for(seq.num_tokens) * block for seq in state.sequences]
        new[0] += shared - owned_hits * block
        may_grow = [each.max_len - seq.num_tokens for each, seq in together]
        may_grow += [state.max_len - seq.num_tokens for seq in state.sequences]
        for each in (*running, state):  # samples and beams that do not exist yet will grow beside the first
            to_come = each.num_rows - len(each.sequences)
            new += [0] * to_come
            may_grow += [each.max_len - each.sequences[0].num_tokens] * to_come
        return self.peak(held + new, may_grow) <= blocks.num_blocks * block

    def peak(self, held: list[int], may_grow: list[int]) -> int:
        """The most tokens held at once, for sequences that hold `held` tokens and may grow by `may_grow`.

        Sequences end in the order of what they still have to generate; just before one ends, it and all that outlive
        it have grown by its remainder.

            remainders, longest first   r0 >= r1 >= r2        peak = max over k of  sum(held[0..k]) + (k + 1) * rk
        """
        remainder = np.minimum(np.array(may_grow), self._mean * SHARE_OF_MEAN)
        longest_first = np.argsort(-remainder, kind="stable")
        sums = np.cumsum(np.array(held)[longest_first])
        return int(np.max(sums + np.arange(1, len(held) + 1) * remainder[longest_first]))
