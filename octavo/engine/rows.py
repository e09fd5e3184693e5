"""Columns that stay from step to step, one row a running sequence, from which each step's Batch is cut.

What a request fixes (sampling parameters, its block table as it grows) is written here once, so that building a batch
is a handful of array look-ups instead of a walk over Python objects. Knows nothing of budgets or order.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.batch import BY_ROW, Batch, Floats, Ints, NextStep, PromptLogprobs, SamplingColumns
from octavo.engine.beam_search import num_candidates
from octavo.engine.decoding import Advance, Members
from octavo.engine.state import Plan
from octavo.engine.token_counts import TokenCounts
from octavo.request import Request, Sequence

# A request's sample k draws from the random stream seed + k * FORK_STRIDE (modulo 2**64): no two samples share one.
FORK_STRIDE = 0x9E3779B97F4A7C15
_OFF_TOP_K = 2**31 - 1  # as good as off: no vocabulary is larger
# Columns of gathered tables that are still empty.
_SPARE_BLOCKS = 16


def changes_logits(request: Request) -> bool:
    """Whether a draw of `request` may need its logits changed before."""
    params = request.params
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.allowed_token_ids is not None
        or params.has_penalties
        or request.bad_words_token_ids
    )


@dataclass(slots=True)
class LogitChanges:
    """What a request's logit_bias, min_tokens and allowed_token_ids say, as arrays: a list may be as long as the
    vocabulary, and stands in every step of the request's samples, of which `num_rows` have a row."""

    bias_token: Ints
    bias_value: Floats
    ends: Ints  # what may not come before min_tokens
    allowed: Ints | None
    num_rows: int = 0

    @classmethod
    def of(cls, request: Request, eos: frozenset[int]) -> "LogitChanges":
        params, bias = request.params, request.params.logit_bias or {}
        return cls(
            bias_token=np.fromiter(bias.keys(), np.int32, len(bias)),
            bias_value=np.fromiter(bias.values(), np.float32, len(bias)),
            ends=np.array(sorted({*eos, *params.stop_token_ids}), np.int32),
            allowed=None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int32),
        )


class RowTable:
    """Rows 0 to `max_rows` - 1, each free or held by one sequence (`Sequence.row`)."""

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, eos_token_ids: tuple[int, ...]):
        self.max_rows = max_rows
        self._block_size = block_size
        self._eos = frozenset(eos_token_ids)
        self._free = list(range(max_rows - 1, -1, -1))
        self._blocks = np.zeros((max_rows, max_blocks), np.int32)
        # The tables of decode-only sequences, in their order.
        self._gathered = self._blocks[:0]
        self._gathered_for: Members | None = None
        # What a step's Batch holds by row, by name.
        self._by_row: dict[str, NDArray[Any]] = {
            each.name: np.full(max_rows, each.padding, each.dtype) for each in BY_ROW
        }
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int32)
        self._top_p = np.ones(max_rows, np.float32)
        self._min_p = np.zeros(max_rows, np.float32)
        self._seed = np.zeros(max_rows, np.uint64)
        self._num_logprobs = np.full(max_rows, -1, np.int32)
        self._token_counts: dict[int, TokenCounts] = {}  # of rows with penalties
        self._changes: dict[str, LogitChanges] = {}  # of requests whose logits are changed
        self._changed = np.zeros(max_rows, np.bool_)  # whose logits are changed before the draw, or may be

    def add(self, seq: Sequence) -> None:
        """Gives `seq` a row and writes what its request fixes."""
        row = seq.row = self._free.pop()
        params = seq.request.params
        self._by_row["ntk_alpha"][row] = seq.ntk_alpha
        self._temperature[row] = 0.0 if params.greedy else params.temperature
        self._top_k[row] = min(params.top_k, _OFF_TOP_K)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = seq.seed
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._changed[row] = changes_logits(seq.request)
        if self._changed[row]:
            name = seq.request.request_id
            if name not in self._changes:
                self._changes[name] = LogitChanges.of(seq.request, self._eos)
            self._changes[name].num_rows += 1
        if params.beams:
            self._num_logprobs[row] = max(self._num_logprobs[row], num_candidates(params, self._eos))
        self.write_blocks(seq, 0)

    def write_blocks(self, seq: Sequence, start: int) -> None:
        """Copies `seq.block_table` from entry `start` on."""
        self._blocks[seq.row, start : len(seq.block_table)] = seq.block_table[start:]

    def append_blocks(self, members: Members, at: NDArray[np.intp], places: Ints, blocks: Ints) -> None:
        """Writes one new block of each of the `members` numbered `at` to its place in the table."""
        self._blocks[members.start.row[at], places] = blocks
        if members is self._gathered_for and int(places.max()) < self._gathered.shape[1]:
            self._gathered[at, places] = blocks
        else:
            self._gathered_for = None

    def remove(self, seq: Sequence) -> None:
        self._free.append(seq.row)
        self._token_counts.pop(seq.row, None)
        if (changes := self._changes.get(seq.request.request_id)) is not None:
            changes.num_rows -= 1
            if not changes.num_rows:
                del self._changes[seq.request.request_id]
        seq.row = -1

    def exclusive_tokens(self, rows: Ints, num_computed: Ints, owner: Ints) -> Ints:
        """Of each owner, numbered from 0, the tokens computed in blocks that no other owner's rows hold.

        `rows` are all that hold blocks, each with its computed tokens, in their owners' order. A block counts once.
        """
        size = np.int32(self._block_size)
        counts = -(-num_computed // size)
        ends = np.cumsum(counts)
        place = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts, counts)
        blocks = self._blocks[np.repeat(rows, counts), place]
        filled = np.minimum(np.repeat(num_computed, counts) - place * size, size)
        owner_of_entry = np.repeat(owner, counts)
        owner_of, tokens = np.zeros((2, blocks.max(initial=0) + 1), np.int32)  # by block
        owner_of[blocks] = owner_of_entry  # whoever comes last
        tokens[blocks] = filled
        tokens[blocks[owner_of[blocks] != owner_of_entry]] = 0
        return np.bincount(owner_of, tokens, int(owner[-1]) + 1).astype(np.int32)

    def step(self, plan: Plan) -> Batch | NextStep:
        """What `plan` says, for a device: decode-only rows, then each (sequence, n) of `entries` with the last n of
        its `num_computed` tokens. Notes the samples' rows in `plan`."""
        if plan.entries:
            return self._batch(plan)
        advance = plan.advance
        assert advance is not None, "a step in which nobody computes anything"
        plan.sample_rows = advance.members.start.row
        if advance.continues and not plan.swap_out:
            return NextStep(advance.grown, advance.blocks)
        return self.decode_batch(plan)

    def _batch(self, plan: Plan) -> Batch:
        advance = plan.advance or Advance(Members())
        first_rows, ahead = advance.members.start.row, len(advance.members.sequences)
        entries, samples = plan.entries, plan.samples
        rows = np.concatenate((first_rows, np.array([seq.row for seq, _ in entries], np.int32)))
        counts = np.concatenate((np.ones(ahead, np.int32), np.array([n for _, n in entries], np.int32)))
        first = np.concatenate((advance.positions, np.array([seq.num_computed - n for seq, n in entries], np.int32)))
        token_ids: list[int] = []
        for seq, n in entries:
            token_ids += seq.token_ids[seq.num_computed - n : seq.num_computed]
        entry_of_row = np.zeros(len(self._blocks), np.int32)
        entry_of_row[rows] = np.arange(len(rows))
        plan.sample_rows = np.concatenate((first_rows, np.array([seq.row for seq, _ in samples], np.int32)))
        batch = Batch.of_rows(
            np.concatenate((advance.token_ids, np.array(token_ids, np.int32))),
            first,
            self._tables(rows, int((first + counts).max())),
            self._block_size,
            counts,
            self._columns(rows),
        )
        query_start = batch.query_start
        batch.sample_index = query_start[1 + entry_of_row[plan.sample_rows]] - 1
        batch.sampling = self._sampling(plan.sample_rows, advance.counter, samples)
        batch.block_copies, batch.swap_out = _pairs(plan.copies), _pairs(plan.swap_out)
        batch.swap_in = _pairs(plan.swap_in)
        batch.prompt_logprobs = _prompt_logprobs(plan.prompt_spans, query_start[entry_of_row], first[entry_of_row])
        if plan.loads:
            batch.loaded_blocks = np.array([block for block, _ in plan.loads], np.int32)
            batch.loaded_bytes = np.stack([content for _, content in plan.loads])
        return batch

    def decode_batch(self, plan: Plan) -> Batch:
        """A decode-only step, as long as no other was made since."""
        advance = plan.advance
        assert advance is not None, "not a decode-only step"
        members, positions = advance.members, advance.positions
        rows = members.start.row
        if members.sampling is None:
            members.sampling = self._sampling(rows, advance.counter, [])
        tables = self._tables_of(members, int(positions.max()) + 1)
        batch = Batch.of_rows(advance.token_ids, positions, tables, self._block_size, by_row=self._columns(rows))
        batch.sample_index = batch.query_start[:-1]
        batch.sampling = replace(members.sampling, counter=advance.counter)
        batch.block_copies, batch.swap_out = _pairs(plan.copies), _pairs(plan.swap_out)
        return batch

    def _columns(self, rows: Ints) -> dict[str, NDArray[Any]]:
        return {name: column[rows] for name, column in self._by_row.items()}

    def _tables_of(self, members: Members, longest: int) -> Ints:
        """As `_tables`, but kept while the members are the same."""
        if members is not self._gathered_for:
            self._gathered = self._tables(members.start.row, longest + _SPARE_BLOCKS * self._block_size)
            self._gathered_for = members
        return self._gathered[:, : -(-longest // self._block_size)]

    def _tables(self, rows: Ints, longest: int) -> Ints:
        return self._blocks[rows, : -(-longest // self._block_size)]

    def _sampling(self, rows: Ints, counter: Ints, samples: list[tuple[Sequence, int]]) -> SamplingColumns:
        """Of the samples in `rows`: first decode-only ones, with their `counter`, then `samples`."""
        forks = np.zeros(len(rows), np.uint64)
        forks[len(counter) :] = [fork for _, fork in samples]
        columns = SamplingColumns(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            seed=self._seed[rows] + forks * np.uint64(FORK_STRIDE),
            counter=np.concatenate((counter, np.array([seq.num_output for seq, _ in samples], np.int32))),
            num_logprobs=self._num_logprobs[rows],
        )
        if self._changed[rows].any():
            numbered = [(i, seq) for i, (seq, _) in enumerate(samples, len(counter))]
            self._write_bias(numbered, columns)
            self._write_allowed(numbered, columns)
            self._write_penalties(numbered, columns)
        return columns

    def _write_bias(self, samples: list[tuple[int, Sequence]], columns: SamplingColumns) -> None:
        """logit_bias, and -inf for what may not come yet (min_tokens) or next (bad words)."""
        parts: list[tuple[int, Ints, Floats]] = []
        for i, seq in samples:
            if not self._changed[seq.row]:
                continue
            changes = self._changes[seq.request.request_id]
            if len(changes.bias_token):
                parts.append((i, changes.bias_token, changes.bias_value))
            forbidden = _completing(seq, seq.request.bad_words_token_ids)
            if seq.num_output < seq.request.params.min_tokens:
                forbidden = np.concatenate((forbidden, changes.ends))
            if len(forbidden):
                parts.append((i, forbidden, np.full(len(forbidden), -np.inf, np.float32)))
        if parts:
            sample, tokens, values = zip(*parts, strict=True)
            columns.bias_sample = np.repeat(np.array(sample, np.int32), [len(part) for part in tokens])
            columns.bias_token, columns.bias_value = np.concatenate(tokens), np.concatenate(values)

    def _write_allowed(self, samples: list[tuple[int, Sequence]], columns: SamplingColumns) -> None:
        changes = [(i, self._changes[seq.request.request_id]) for i, seq in samples if self._changed[seq.row]]
        lists = [(i, change.allowed) for i, change in changes if change.allowed is not None]
        if lists:
            columns.allowed_sample = np.array([i for i, _ in lists], np.int32)
            columns.allowed_start = np.cumsum([0, *(len(allowed) for _, allowed in lists)], dtype=np.int32)
            columns.allowed_token = np.concatenate([allowed for _, allowed in lists])

    def _write_penalties(self, samples: list[tuple[int, Sequence]], columns: SamplingColumns) -> None:
        chosen = [(i, seq) for i, seq in samples if seq.request.params.has_penalties]
        if not chosen:
            return
        known = self._token_counts
        for _, seq in chosen:
            if seq.row not in known:
                known[seq.row] = TokenCounts(seq)
        tokens, counts = zip(*(known[seq.row].update(seq) for _, seq in chosen), strict=True)
        params = [seq.request.params for _, seq in chosen]
        columns.penalty_sample = np.array([i for i, _ in chosen], np.int32)
        columns.repetition_penalty = np.array([p.repetition_penalty for p in params], np.float32)
        columns.presence_penalty = np.array([p.presence_penalty for p in params], np.float32)
        columns.frequency_penalty = np.array([p.frequency_penalty for p in params], np.float32)
        columns.penalty_pending = np.array([seq.token_ids[-1] if seq.num_pending else 0 for _, seq in chosen], np.int32)
        columns.penalty_start = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        columns.penalty_token = np.concatenate(tokens)
        columns.penalty_count = np.concatenate(counts)


def _pairs(copies: list[tuple[int, int]]) -> Ints:
    return np.array(copies, np.int32).reshape(-1, 2)


def _completing(seq: Sequence, words: list[list[int]]) -> Ints:
    """The tokens that would complete one of `words` after the tokens that `seq` has."""
    answer = seq.num_output
    found = [
        last for *start, last in words if len(start) <= answer and (not start or seq.token_ids[-len(start) :] == start)
    ]
    return np.array(found, np.int32)


def _prompt_logprobs(
    spans: list[tuple[Sequence, int, int]], start_of_row: Ints, first_of_row: Ints
) -> PromptLogprobs | None:
    """Flat token index and target of each wanted position, from each row's first flat index and first position."""
    if not spans:
        return None
    index: list[int] = []
    target: list[int] = []
    wanted: list[int] = []
    for seq, start, count in spans:
        flat = int(start_of_row[seq.row] + start - first_of_row[seq.row])
        index += range(flat, flat + count)
        target += seq.token_ids[start + 1 : start + count + 1]
        wanted += [seq.request.params.prompt_logprobs or 0] * count
    return PromptLogprobs(np.array(index, np.int32), np.array(target, np.int32), np.array(wanted, np.int32))
