"""The scheduler's nouns: a request as it runs, a step while it is made, and what a step tells the outside.

They hold state and decide nothing.
"""

from dataclasses import dataclass, field

import numpy as np

from octavo.batch import Ints, LogprobColumns
from octavo.engine.beam_search import BeamSearch, Hypothesis
from octavo.engine.decoding import Advance
from octavo.engine.prefix_store import Bytes
from octavo.errors import OctavoError
from octavo.request import BeamScore, Request, Sequence, TokenOutput


@dataclass(slots=True, eq=False)
class RequestState:
    """A request in the scheduler: its unfinished sequences, which wait, run and are preempted together."""

    request: Request
    order: tuple[int, float, int]  # priority, arrival, number: the queue's order
    sequences: list[Sequence]
    max_len: int  # tokens of prompt and answer at which a sequence ends
    min_len: int  # and before which it does not, unless somebody aborts it
    forked: bool  # whether its samples or beams exist; until the prompt is computed there is one sequence
    search: BeamSearch | None = None
    bound: bool = False  # whether its draws depend on the very last token: bad words
    penalized: bool = False  # whether they depend on all tokens before, of which a device may know the last
    waits: bool = False  # whether, being penalized, it skips steps until all its tokens are known
    plain: bool = False  # whether it could do nothing but decode: its draws want temperature and filters alone
    decoding: bool = False  # whether its sequences are in `Decoding`
    started: bool = False
    counted: int = 0  # prompt tokens that were cached, or have been put on its tenant's account
    lost_tokens: int = 0  # computed before the last preemption, and not kept in host memory

    @property
    def num_rows(self) -> int:
        """Rows to keep for it: those of samples that do not exist yet among them."""
        if self.forked and self.search is None:
            return len(self.sequences)
        return self.request.params.num_sequences

    @property
    def must_grow(self) -> int:
        """Tokens that all its answers together have at least."""
        return (self.min_len - len(self.request.prompt_token_ids)) * self.request.params.num_sequences

    def growth(self, held: list[int]) -> list[tuple[int, int, int]]:
        """As `Growth`, of its sequences, which hold so many blocks, and of samples and beams that do not exist yet and
        will grow beside the first."""
        lengths = [len(seq.token_ids) for seq in self.sequences]
        lengths += [lengths[0]] * (self.num_rows - len(lengths))
        held = held + [0] * (len(lengths) - len(held))
        return [(n, self.max_len - k, max(0, self.min_len - k)) for n, k in zip(held, lengths, strict=True)]

    @property
    def runs_ahead(self) -> bool:
        """Whether its next step may be scheduled before the last one's tokens are seen.

        It may not where the step's shape or its draws depend on them: samples still to be forked, beams, or `bound`.
        """
        return self.forked and self.search is None and not self.bound

    @property
    def num_common(self) -> int:
        """Tokens with which all its sequences begin, and after which each has at least one more."""
        tokens = [seq.token_ids for seq in self.sequences]
        shortest = min(map(len, tokens)) - 1
        # What the first and the last in lexical order have in common, all between them have too.
        pairs = zip(min(tokens), max(tokens), strict=False)
        return min(shortest, next((i for i, (low, high) in enumerate(pairs) if low != high), shortest))

    @property
    def swapped(self) -> bool:
        """Whether its K/V is in host memory."""
        return any(seq.host_table for seq in self.sequences)


@dataclass(slots=True)
class Plan:
    """A step while it is made, and until its result is read."""

    budget: int  # tokens that may still be added
    number: int = 0  # of the step
    rows: int = 0  # of the running requests, those kept for samples to come among them; known while others join
    advance: Advance | None = None  # decode-only rows: first in the step, with a token and a sample each
    entries: list[tuple[Sequence, int]] = field(default_factory=list)
    # Who of them draws a token, in the entries' order: (sequence, 0), and (sequence, k) for its k-th fork, still to
    # be made.
    samples: list[tuple[Sequence, int]] = field(default_factory=list)
    sample_rows: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # of all samples, when the step was made
    # (sequence, prompt position of the first, number of positions) whose logprobs are wanted
    prompt_spans: list[tuple[Sequence, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (device block, host block)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (device block, host block)
    loads: list[tuple[int, Bytes]] = field(default_factory=list)  # (block, its bytes from the prefix store)


@dataclass(slots=True)
class StepOutput:
    """What one step tells the outside, in plain values: it crosses to the HTTP process as one message.

    The answers of a beam search come whole when the search ends, each with its score.
    """

    tokens: list[TokenOutput]
    # Requests admitted for the first time: (request id, seconds in the queue, prompt tokens found in the cache).
    started: list[tuple[str, float, int]] = field(default_factory=list)
    # (request id, prompt position of the first entry, one entry a position): columns, since there may be a great many
    prompt_logprobs: list[tuple[str, int, LogprobColumns]] = field(default_factory=list)
    beam_scores: list[BeamScore] = field(default_factory=list)
    # Requests that ended by a fault of their own: (request id, what it was).
    failed: list[tuple[str, OctavoError]] = field(default_factory=list)

    def add_answers(self, request_id: str, answers: list[Hypothesis]) -> None:
        """Adds a search's answers, token by token."""
        for index, answer in enumerate(answers):
            *links, last = answer.end.chain()
            self.tokens += [(request_id, index, link.token, None, None, link.logprobs) for link in links]
            ending = (answer.finish_reason, answer.stop_token_id)
            self.tokens.append((request_id, index, last.token, *ending, last.logprobs))
            self.beam_scores.append((request_id, index, answer.cumulative_logprob, answer.score))

    def add_prompt_logprobs(self, plan: Plan, columns: LogprobColumns | None) -> None:
        """Adds what `plan` asked for, found in `columns`."""
        first = 0
        for seq, start, count in plan.prompt_spans:
            assert columns is not None, "the step was asked for prompt logprobs"
            wanted = seq.request.params.prompt_logprobs or 0
            self.prompt_logprobs.append((seq.request.request_id, start, columns.part(first, count, wanted)))
            first += count
