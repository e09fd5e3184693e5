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
        self.update(seq)

    def update(self, seq: Sequence) -> None:
        """Takes in what `seq` has drawn since."""
        for token in seq.token_ids[self._num_seen : seq.num_known]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._tokens):
                self._tokens, self._counts = (
                    np.concatenate((a, np.zeros_like(a))) for a in (self._tokens, self._counts)
                )
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_seen = seq.num_known

    @property
    def tokens(self) -> Ints:
        """Each token once."""
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> Ints:
        """How often each was drawn; 0 for those that only the prompt has."""
        return self._counts[: len(self._place)]
