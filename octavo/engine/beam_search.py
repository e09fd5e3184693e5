"""One request's beam search: which beams go on, from which parent and with which token, and which answers are finished.

It follows `transformers`' generate(num_beams=..., do_sample=False) step for step, so that sequences and scores are the
same. It sees candidate tokens with their logprobs, and knows nothing of blocks, steps or budgets.
"""

from dataclasses import dataclass
from typing import NamedTuple

from octavo.request import FinishReason, TokenLogprobs
from octavo.sampling_params import SamplingParams


class Survivor(NamedTuple):
    """A beam of the next step: beam `parent` of the last one, continued by `token`."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """The last token of a beam, and the beam before it. Beams with a common beginning share its links."""

    before: "Link | None"
    token: int
    logprobs: TokenLogprobs | None  # as a caller asked for them; None if not

    def chain(self) -> list["Link"]:
        """All links of the beam, first token first."""
        links, link = [], self
        while True:
            links.append(link)
            if link.before is None:
                return links[::-1]
            link = link.before


@dataclass(slots=True)
class Hypothesis:
    """A finished answer of `length` tokens. `score` is `cumulative_logprob` / length ** length_penalty."""

    end: Link
    length: int
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason
    stop_token_id: int | None


class Candidate(NamedTuple):
    """Beam `parent` continued by the token at `place` of its list of likeliest tokens."""

    cumulative_logprob: float
    parent: int
    token: int
    place: int


def num_candidates(params: SamplingParams, eos_token_ids: frozenset[int]) -> int:
    """The likeliest tokens to be had from each beam: among so many, `beam_width` do not end it."""
    return params.beam_width + len(stop_tokens(params, eos_token_ids))


def stop_tokens(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end a beam."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)


class BeamSearch:
    """The search of one request, for answers of at most `max_tokens` tokens.

    Each step, `put` the `num_candidates` likeliest tokens of every beam (at first there is one), then `advance`.
    """

    def __init__(self, params: SamplingParams, eos_token_ids: frozenset[int], max_tokens: int):
        self._params = params
        self._stops = stop_tokens(params, eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self.num_candidates = num_candidates(params, eos_token_ids)
        self._max_tokens = max_tokens
        self._length = 0  # tokens of each beam
        self._beams: list[tuple[Link | None, float]] = [(None, 0.0)]  # the last token, cumulative logprob; best first
        self._given: dict[int, TokenLogprobs] = {}
        self._finished: list[Hypothesis] = []  # best first, `beam_width` at most
        self.done = False

    def put(self, beam: int, logprobs: TokenLogprobs) -> None:
        """Takes beam `beam`'s likeliest next tokens: after the first entry, which is skipped, in falling order."""
        self._given[beam] = logprobs

    @property
    def ready(self) -> bool:
        """Whether all beams have their candidates."""
        return len(self._given) == len(self._beams)

    def forget(self) -> None:
        """Drops the candidates that were put since the last `advance`: they will be computed again."""
        self._given.clear()

    def advance(self) -> list[Survivor]:
        """One step of the search: the beams that go on, best first; none when the search is `done`."""
        best = self._candidates()
        width, length = self._params.beam_width, self._length + 1
        ends = [self._ending(candidate.token, length) for candidate in best]
        going = [candidate for candidate, end in zip(best, ends, strict=True) if end is None][:width]
        # Only what is among the best as it ends may be an answer; the others were there to go on.
        for candidate, end in zip(best[:width], ends, strict=False):
            if end is not None:
                self._finish(candidate, *end)
        self._finished = sorted(self._finished, key=lambda hypothesis: -hypothesis.score)[:width]
        self._beams = [(self._link(candidate), candidate.cumulative_logprob) for candidate in going]
        self._length = length
        self._given = {}
        self.done = not going or not self._may_improve()
        return [] if self.done else [Survivor(candidate.parent, candidate.token) for candidate in going]

    def answers(self) -> list[Hypothesis]:
        """The n best finished answers, best first."""
        return self._finished[: self._params.n]

    @property
    def _full(self) -> bool:
        return len(self._finished) >= self._params.beam_width

    def _candidates(self) -> list[Candidate]:
        """What may follow, best first; of equals the earlier beam's, as in a search over all vocabularies in a row."""
        early = self._length < self._params.min_tokens
        candidates = [
            Candidate(before + logprob, parent, token, place)
            for parent, (_, before) in enumerate(self._beams)
            for place, (token, logprob) in enumerate(zip(*self._given[parent][:2], strict=True))
            if place and not (early and token in self._stops)
        ]
        return sorted(candidates, key=lambda candidate: -candidate.cumulative_logprob)

    def _ending(self, token: int, length: int) -> tuple[FinishReason, int | None] | None:
        if token in self._stops:
            return "stop", token if token in self._stop_ids else None
        return ("length", None) if length == self._max_tokens else None

    def _finish(self, candidate: Candidate, reason: FinishReason, stop_token_id: int | None) -> None:
        length, total = self._length + 1, candidate.cumulative_logprob
        score = total / length**self._params.length_penalty
        self._finished.append(Hypothesis(self._link(candidate), length, total, score, reason, stop_token_id))

    def _link(self, candidate: Candidate) -> Link:
        logprobs, wanted = None, self._params.logprobs
        if wanted is not None:
            token_ids, values, _ = self._given[candidate.parent]
            place = candidate.place
            kept = slice(1, 1 + wanted)
            logprobs = ([candidate.token, *token_ids[kept]], [values[place], *values[kept]], place)
        return Link(self._beams[candidate.parent][0], candidate.token, logprobs)

    def _may_improve(self) -> bool:
        """Whether going on could still better the finished answers, as far as `early_stopping` cares."""
        if not self._full:
            return True
        penalty, early_stopping = self._params.length_penalty, self._params.early_stopping
        if early_stopping is True:
            return False
        # Longer is better where the penalty is above 0, so the longest answer is the most hopeful one.
        length = self._max_tokens if early_stopping == "never" and penalty > 0 else self._length
        hope: float = self._beams[0][1] / length**penalty
        return hope > self._finished[-1].score
