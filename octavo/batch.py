"""What crosses from the engine to the runner and back: one flat `Batch` of arrays, one `StepResult`.

A Batch is complete: a worker needs nothing else to compute a step, so it keeps no mirror of requests. Rows are
sequences; tokens of all rows lie one after another, so a prompt's chunk and a single decoded token look alike.

    row          0             1    2
    token_ids    [ 5 9 2 7 ]   [3]  [ 8 1 ]
    query_start  0             4    5        7
    seq_lens     4 (a prompt)  90   18 (16 cached tokens and a chunk of 2)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.request import TokenLogprobs
from octavo.step_layout import StepSize, array, arrays_of

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

# What a sampler gives in place of a token where none can be sampled: all logits are -inf, or one is NaN or +inf.
NO_TOKEN, NOT_FINITE = -1, -2


@dataclass(slots=True)
class SamplingColumns:
    """Sampling parameters, one entry a sample (S in all). A feature that no sample uses has empty arrays.

    The noise of a sample is a function of (`seed`, `counter`, token id) alone, so a seeded request draws the same
    tokens in any batch. `temperature` 0 is exact argmax.
    """

    temperature: Floats
    top_k: Ints  # 0: off
    top_p: Floats  # 1: off
    min_p: Floats  # 0: off
    seed: NDArray[np.uint64]
    counter: Ints  # index of the token being drawn, in its sequence
    num_logprobs: Ints  # -1: none, 0: of the drawn token alone, k: also of the k most likely
    # What follows is in the order of the samples.
    # Added to logits, as (sample, token id, value) triples; -inf forbids a token.
    bias_sample: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    bias_token: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    bias_value: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    # Samples that may draw only from a list: sample `allowed_sample[i]` from `allowed_token` between the starts.
    allowed_sample: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    allowed_start: Ints = field(default_factory=lambda: np.zeros(1, np.int32))
    allowed_token: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    # Samples with penalties. What sample `penalty_sample[i]` has so far are the distinct tokens `penalty_token` between
    # `penalty_start[i]` and `penalty_start[i + 1]`, drawn so often (0: in the prompt alone), and where it is below 0
    # `penalty_pending[i]`, a token as in `Batch.token_ids`.
    penalty_sample: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    repetition_penalty: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    presence_penalty: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    frequency_penalty: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    penalty_pending: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    penalty_start: Ints = field(default_factory=lambda: np.zeros(1, np.int32))
    penalty_token: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    penalty_count: Ints = field(default_factory=lambda: np.empty(0, np.int32))

    @classmethod
    def none(cls) -> "SamplingColumns":
        """Of no sample."""
        ints, floats = np.empty(0, np.int32), np.empty(0, np.float32)
        return cls(floats, ints, floats, floats, np.empty(0, np.uint64), ints, ints)

    @property
    def num_samples(self) -> int:
        return len(self.temperature)

    def part(self, start: int, stop: int) -> "SamplingColumns":
        """The columns of samples `start` to `stop` alone."""
        bias = (self.bias_sample >= start) & (self.bias_sample < stop)
        first, last = np.searchsorted(self.allowed_sample, (start, stop))
        allowed = self.allowed_start[first : last + 1]
        low, high = np.searchsorted(self.penalty_sample, (start, stop))
        starts = self.penalty_start[low : high + 1]
        return SamplingColumns(
            temperature=self.temperature[start:stop],
            top_k=self.top_k[start:stop],
            top_p=self.top_p[start:stop],
            min_p=self.min_p[start:stop],
            seed=self.seed[start:stop],
            counter=self.counter[start:stop],
            num_logprobs=self.num_logprobs[start:stop],
            bias_sample=self.bias_sample[bias] - np.int32(start),
            bias_token=self.bias_token[bias],
            bias_value=self.bias_value[bias],
            allowed_sample=self.allowed_sample[first:last] - np.int32(start),
            allowed_start=allowed - allowed[0],
            allowed_token=self.allowed_token[allowed[0] : allowed[-1]],
            penalty_sample=self.penalty_sample[low:high] - np.int32(start),
            repetition_penalty=self.repetition_penalty[low:high],
            presence_penalty=self.presence_penalty[low:high],
            frequency_penalty=self.frequency_penalty[low:high],
            penalty_pending=self.penalty_pending[low:high],
            penalty_start=starts - starts[0],
            penalty_token=self.penalty_token[starts[0] : starts[-1]],
            penalty_count=self.penalty_count[starts[0] : starts[-1]],
        )

    @property
    def only_draws(self) -> bool:
        """Whether logits go into the draw as they are, and nobody asks for log probabilities."""
        changed = len(self.bias_sample) or len(self.allowed_sample) or len(self.penalty_sample)
        return not changed and not (self.num_logprobs >= 0).any()


@dataclass(slots=True)
class PromptLogprobs:
    """Prompt positions of this step whose next token's logprob is asked for, one entry a position."""

    token_index: Ints  # flat index of the position's token in this step
    target: Ints  # the prompt token that follows it
    num_logprobs: Ints  # how many of the most likely tokens are wanted as well


@dataclass(slots=True)
class Batch:
    """One step. R rows, T tokens, S samples; see the module's picture, and `of_rows` for the way to make one."""

    # ~i, below 0, is the token that sample i of the step before this one draws.
    token_ids: Ints = array("T")
    positions: Ints = array("T")  # of each token in its sequence
    # Of each token in the cache: block * block_size + offset; -1 is nowhere.
    slots: Ints = array("T", padding=-1)
    query_start: Ints = array("R+1")
    seq_lens: Ints = array("R")  # tokens whose K/V is in the cache after this step
    block_tables: Ints = array("RM")  # padded with 0
    # Factor on the rotary base, see RopeConfig.ntk_alpha; the host makes angles of it.
    ntk_alpha: Floats = array("R", np.float32, padding=1, sent=False)
    # [S] flat index of the token after which a sample is drawn; n samples name it n times.
    sample_index: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    sampling: SamplingColumns = field(default_factory=lambda: SamplingColumns.none())
    # [C, 2] blocks to copy, source to destination, before the step (copy-on-write).
    block_copies: Ints = field(default_factory=lambda: np.empty((0, 2), np.int32))
    prompt_logprobs: PromptLogprobs | None = None
    # Blocks to copy to host memory, and then others back from it, before `block_copies`: (device block, host block).
    swap_out: Ints = field(default_factory=lambda: np.empty((0, 2), np.int32))  # [O, 2]
    swap_in: Ints = field(default_factory=lambda: np.empty((0, 2), np.int32))  # [I, 2]
    # Blocks to fill with bytes from the prefix store before the step, after `swap_out`.
    loaded_blocks: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # [L]
    loaded_bytes: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0), np.uint8))  # [L, bytes of a block]

    @classmethod
    def of_rows(
        cls,
        token_ids: Ints,
        first: Ints,
        block_tables: Ints,
        block_size: int,
        counts: Ints | None = None,
        by_row: Mapping[str, NDArray[Any]] | None = None,
    ) -> "Batch":
        """A step in which row r computes `counts[r]` tokens, or one, from position `first[r]` on, into the blocks of
        its table. Its arrays by row that are not given are padding. Who draws, and what is moved, is left to fill in.
        """
        R = len(first)
        if counts is None:
            query_start = np.arange(R + 1, dtype=np.int32)
            row_of_token, positions, seq_lens = query_start[:-1], first, first + np.int32(1)
        else:
            query_start = np.zeros(R + 1, np.int32)
            np.cumsum(counts, out=query_start[1:])
            row_of_token = np.repeat(np.arange(R, dtype=np.int32), counts)
            positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(first - query_start[:-1], counts)
            seq_lens = first + counts
        slots = block_tables[row_of_token, positions // block_size] * block_size
        slots += positions % block_size
        given = by_row or {}
        columns: dict[str, Any] = {
            each.name: given[each.name] if each.name in given else np.full(R, each.padding, each.dtype)
            for each in BY_ROW
        }
        return cls(token_ids, positions, slots, query_start, seq_lens, block_tables, **columns)

    def padded(self, size: StepSize, decode_rows: int) -> dict[str, NDArray[Any]]:
        """What is sent of the step, by name, padded to `size`; its first `decode_rows` rows have one token each."""
        return {each.name: size.pad(getattr(self, each.name), each, decode_rows) for each in SENT}

    def in_order(self, order: Ints, place: Ints) -> "Batch":
        """The step with its rows, a token each, in another order: `place` is that of each."""
        arrays = {each.name: getattr(self, each.name)[order] for each in STEP_ARRAYS if each.dims != "R+1"}
        return replace(self, sample_index=place[self.sample_index], **arrays)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens)

    def begun_blocks(self, block_size: int, *, of_chunks: bool = False) -> Ints:
        """Blocks whose first slot a row fills in this step, and whose last it does not; with `of_chunks` those alone of
        rows with several tokens.

        Attention may multiply by zero what lies in the slots behind, and a NaN that was left there would survive that.
        """
        first, end = self.query_start[:-1], self.query_start[1:]
        position = self.positions[end - 1]
        offset = position % block_size
        begun = (position - offset >= self.positions[first]) & (offset < block_size - 1)
        begun &= self.slots[end - 1] >= 0  # those of steps that only measure lie nowhere
        if of_chunks:
            begun &= end - first > 1
        blocks: Ints = self.slots[end[begun] - 1] // block_size
        return blocks

    def check_ids(self, vocab_size: int, num_drawn: int = 0) -> None:
        """Asserts that every token is in the vocabulary, or one of `num_drawn` that the step before may have drawn:
        a device reads its embedding without asking."""
        least, most = int(self.token_ids.min(initial=0)), int(self.token_ids.max(initial=0))
        assert -num_drawn <= least <= most < vocab_size, f"a step holds token ids from {least} to {most}"


STEP_ARRAYS = arrays_of(Batch)
# What is sent to a device, the tables last: what of their place is not needed is not sent.
SENT = tuple(sorted((each for each in STEP_ARRAYS if each.sent), key=lambda each: each.dims == "RM"))
# Those by row that `Batch.of_rows` does not make itself: columns of the row table.
BY_ROW = tuple(each for each in STEP_ARRAYS if each.dims == "R" and each.name != "seq_lens")


@dataclass(frozen=True, slots=True)
class NextStep:
    """A decode step over the rows of the step before: same samples and parameters, each row one token further.

    A device that still has that step need only know which N rows get a block for their token. Any other is given the
    Batch that this stands for, by `Scheduler.whole`.
    """

    rows: NDArray[np.intp]  # [N] of the step
    blocks: Ints  # [N]


@dataclass(slots=True)
class LogprobColumns:
    """Log probabilities of E entries, from the model's own distribution (before temperature, filters, penalties).

    Column 0 is the drawn (or the prompt's) token, columns 1 to k the most likely ones in falling order.
    """

    token_ids: Ints  # [E, 1 + k]
    logprobs: Floats  # [E, 1 + k]
    rank: Ints  # [E] rank of the token in column 0; 1 is the most likely

    def __len__(self) -> int:
        return len(self.rank)

    def entry(self, i: int, k: int | None = None) -> TokenLogprobs:
        """Entry `i` as plain lists: the token itself, then its `k` most likely ones, or all that there are."""
        end = None if k is None else 1 + k
        return self.token_ids[i, :end].tolist(), self.logprobs[i, :end].tolist(), int(self.rank[i])

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return map(self.entry, range(len(self)))

    def part(self, start: int, count: int, k: int) -> "LogprobColumns":
        """A copy of `count` entries from `start` on, with the `k` most likely tokens of each."""
        entries = slice(start, start + count)
        return LogprobColumns(
            self.token_ids[entries, : 1 + k].copy(), self.logprobs[entries, : 1 + k].copy(), self.rank[entries].copy()
        )

    @classmethod
    def of(cls, parts: "Sequence[LogprobColumns]") -> "LogprobColumns":
        """One below the other, the narrower ones filled up with zeros that nobody reads."""
        width = max(part.token_ids.shape[1] for part in parts)
        added = [((0, 0), (0, width - part.token_ids.shape[1])) for part in parts]
        return cls(
            token_ids=np.concatenate([np.pad(part.token_ids, more) for part, more in zip(parts, added, strict=True)]),
            logprobs=np.concatenate([np.pad(part.logprobs, more) for part, more in zip(parts, added, strict=True)]),
            rank=np.concatenate([part.rank for part in parts]),
        )

    @classmethod
    def spread(cls, parts: "Sequence[LogprobColumns]", columns: SamplingColumns) -> "LogprobColumns":
        """One entry a sample, from entries for those that ask; the others are zeros that nobody reads."""
        found = cls.of(parts)
        asks = columns.num_logprobs >= 0
        if asks.all():
            return found
        arrays = (found.token_ids, found.logprobs, found.rank)
        whole = cls(*(np.zeros((len(asks), *array.shape[1:]), array.dtype) for array in arrays))
        whole.token_ids[asks], whole.logprobs[asks], whole.rank[asks] = arrays
        return whole


@dataclass(slots=True)
class StepResult:
    """What a step gives back: the only copy from device to host."""

    token_ids: Ints  # [S]; NO_TOKEN or NOT_FINITE where none could be sampled
    logprobs: LogprobColumns | None = None  # E = S when any sample asks
    prompt_logprobs: LogprobColumns | None = None  # E = entries of Batch.prompt_logprobs
