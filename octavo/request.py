"""A request on its way through the engine, and the results that a caller gets.

`Request` is what a client submits (it crosses the process boundary), `Sequence` is one of its samples or beams as the
engine keeps it, `RequestOutput` is what comes back. Words are handled elsewhere: here, tokens are numbers.
"""

import time
from dataclasses import dataclass, field

from octavo.sampling_params import SamplingParams

# Why a sequence ended: "stop" (EOS, a stop token or a stop string), "length" (max_tokens or the model's length),
# "abort" (the client went away), "error" (no token could be sampled, or the engine died).
FinishReason = str

# One new token of one sequence, as a plain tuple because hundreds cross the pipe each step:
# (request id, index of the sequence, token id, finish reason or None, stop token id or None, logprobs or None);
# logprobs is ([token ids], [logprobs], rank) with the drawn token first.
TokenLogprobs = tuple[list[int], list[float], int]
TokenOutput = tuple[str, int, int, FinishReason | None, int | None, TokenLogprobs | None]
# What a beam search says of one of its answers:
# (request id, index of the answer, cumulative logprob, that over length ** length_penalty).
BeamScore = tuple[str, int, float, float]


@dataclass(slots=True)
class Request:
    """One prompt with its sampling parameters.

    `priority`: lower goes first, ties by arrival. `cache_salt` keeps the prefix cache of one caller apart from
    another's. `tenant` is who asks, where tenants have fair shares. `bad_words_token_ids` are `params.bad_words` in
    tokens, filled in where the tokenizer is.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    arrival: float = field(default_factory=time.monotonic)
    tenant: str = ""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample or beam of a request, as the engine keeps it.

    `token_ids` are prompt and answer. `num_computed` of them have their K/V in the blocks of `block_table`; each step
    moves it towards `len(token_ids)`. That difference is all the state there is.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    num_prompt: int
    ntk_alpha: float = 1.0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    # Hashes of this sequence's full blocks, as far as they were needed: they depend on tokens alone, so they outlive
    # the blocks. The first `num_committed` blocks of the table have been offered to the prefix cache.
    block_hashes: list[bytes] = field(default_factory=list)
    num_committed: int = 0
    num_borrowed: int = 0  # blocks of the table that somebody else held when it was given them
    fills: int = 0  # tokens up to which it fills blocks that its siblings already share and wait for
    host_table: list[int] = field(default_factory=list)  # while it is swapped out: the host blocks with its K/V
    row: int = -1  # place in the engine's row table while the sequence holds blocks
    num_pending: int = 0  # tokens at the end that are still being drawn: placeholders, see `Batch.token_ids`
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has seen."""
        return len(self.token_ids) - self.num_pending

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def want(self) -> int:
        """Tokens still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be computed whose logprobs were asked for."""
        asked = self.request.params.prompt_logprobs is not None
        return asked and self.num_output == 0 and self.num_computed < self.num_prompt - 1


@dataclass(slots=True)
class Logprob:
    """Log probability of a token at its position; rank 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request's answer. `stop_reason` is the stop string or stop token id that ended it.

    `cumulative_logprob` is there when logprobs were asked for, and in a beam search; `beam_score`, by which the answers
    of a beam search are ordered, is that over length ** length_penalty, EOS counted.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    beam_score: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's result. `prompt` is None when token ids were given; `outputs` holds its n samples by index.

    `prompt_logprobs` has an entry for each prompt token, None for the first. `num_cached_tokens` of the prompt came
    from the prefix cache. `error` is why the request failed, if it did; its outputs then end with the reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
