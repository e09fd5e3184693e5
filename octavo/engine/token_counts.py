"""Which tokens a sequence has, and how often it drew each: what penalties are about, kept from step to step."""

import numpy as np

from octavo.batch import Ints
from octavo.request import Sequence


class TokenCounts:
    """Of one sequence, as far as its tokens are known."""

    def __init__(self, seq: Sequence):
        distinct = dict.fromkeys(seq.token_ids[: seq.num_prompt])
        self._place = {token: i for i, token in enumerate(distinct)}
        self._tokens = np.zeros(2 * len(distinct) + 16, np.int32)
        self._tokens[: len(distinct)] = list(distinct)
        self._counts = np.zeros_like(self._tokens)
        self._num_seen = seq.num_prompt

    def update(self, seq: Sequence) -> tuple[Ints, Ints]:
        """Takes in what `seq` has drawn since. Returns each token once, and how often each was drawn: 0 for those that
        only the prompt has."""
        known = len(seq.token_ids) - seq.num_pending
        for token in seq.token_ids[self._num_seen : known]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_seen = known
        size = len(self._place)
        return self._tokens[:size], self._counts[:size]
