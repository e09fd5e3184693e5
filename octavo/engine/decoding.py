"""Sequences that draw a token in every step, as columns: hundreds of them go forward in a few array operations.

A request that does nothing but decode joins with all its samples, and leaves when it ends, is aborted or preempted.
While it is here the columns are the truth. Its `Sequence`s keep their block tables, but `token_ids`, `num_computed` and
`num_pending` stay as they were until `leave` writes them, or `take` now and then, and full blocks are offered to the
prefix cache by `leave` alone. A member's last token is always the only one to compute, and it has no block that it does
not need yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Ints, SamplingColumns
from octavo.engine.block_manager import BlockManager
from octavo.request import Sequence, TokenOutput

_NEVER = np.iinfo(np.int64).max
# Steps whose tokens are kept before they are written to their sequences.
_LOG_STEPS = 256
_NONE = np.empty(0, np.int32)


class Columns(NamedTuple):
    """Numbers by member."""

    row: Ints = _NONE  # in the row table
    length: Ints = _NONE  # tokens, those that are being drawn among them
    known: Ints = _NONE  # tokens without those
    max_len: Ints = _NONE
    min_len: Ints = _NONE  # as `RequestState`'s
    borrowed: Ints = _NONE  # blocks of the table that somebody else held when it was given them
    num_prompt: Ints = _NONE
    next_token: Ints = _NONE  # to compute, as in `Batch`
    heeds_eos: NDArray[np.bool_] = np.empty(0, np.bool_)


class Growth(NamedTuple):
    """What running sequences hold and may still take, numbers by sequence."""

    held: Ints = _NONE  # blocks, without those that somebody else held before
    may_grow: Ints = _NONE  # tokens at most
    must_grow: Ints = _NONE  # tokens at least

    @classmethod
    def of(cls, sequences: list[tuple[int, int, int]]) -> "Growth":
        return cls(*np.array(sequences, np.int32).reshape(-1, 3).T)


@dataclass(slots=True, eq=False)
class Members:
    """Who is here, until somebody comes or goes, in the order of their tokens and samples in a step. M members."""

    sequences: list[Sequence] = field(default_factory=list)
    start: Columns = field(default_factory=Columns)  # when these became the members
    request_ids: list[str] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)  # of the sample in its request
    watched: list[tuple[int, frozenset[int]]] = field(default_factory=list)  # (member, its own stop tokens)
    sampling: SamplingColumns | None = None  # what does not change of it; filled in by the row table

    @classmethod
    def of(cls, sequences: list[Sequence], start: Columns) -> "Members":
        stops = ((i, frozenset(seq.request.params.stop_token_ids)) for i, seq in enumerate(sequences))
        return cls(
            sequences,
            start,
            [seq.request.request_id for seq in sequences],
            [seq.index for seq in sequences],
            [(i, tokens) for i, tokens in stops if tokens],
        )

    def only(self, kept: list[int], start: Columns) -> "Members":
        """Those numbered so, in that order."""
        place = {member: i for i, member in enumerate(kept)} if self.watched else {}
        return Members(
            [self.sequences[i] for i in kept],
            start,
            [self.request_ids[i] for i in kept],
            [self.indexes[i] for i in kept],
            [(place[i], stops) for i, stops in self.watched if i in place],
        )


@dataclass(slots=True)
class Advance:
    """What the members compute in one step: each its last token. M members, N of whom have got a block for it."""

    members: Members
    steps: int = 0  # that they had made before, since they became the members
    tokens: Ints | None = None  # to compute; None: what each draws in the step before
    grown: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))  # [N] members
    blocks: Ints = field(default_factory=lambda: _NONE)  # [N]
    continues: bool = False  # whether the step before was theirs as well, with the same members

    @property
    def token_ids(self) -> Ints:
        return _drawn(len(self.members.sequences)) if self.tokens is None else self.tokens

    @property
    def positions(self) -> Ints:
        return self.members.start.length + np.int32(self.steps - 1)

    @property
    def counter(self) -> Ints:
        return self.members.start.length - self.members.start.num_prompt + np.int32(self.steps)


def _drawn(count: int) -> Ints:
    """The tokens that the first samples of a step draw, as token ids of the next one."""
    return np.arange(-1, -1 - count, -1, dtype=np.int32)


class Decoding:
    """Columns for at most `max_rows` sequences. Steps are numbered, and their results come in that order."""

    def __init__(self, max_rows: int, blocks: BlockManager, eos_token_ids: frozenset[int]):
        self._blocks = blocks
        self._eos = sorted(eos_token_ids)
        # By row of the row table: the first step whose result is taken in here, and the member.
        self._first_step = np.full(max_rows, _NEVER)
        self._member = np.zeros(max_rows, np.int32)
        self._log = np.zeros((_LOG_STEPS, max_rows), np.int32)
        self._log_start = self._seen = -1  # number of the step in the log's first line; of the last that was taken in
        self._last: Members | None = None  # the members at the last step
        self._settle(Members())

    def __len__(self) -> int:
        return len(self._members.sequences)

    # ---- coming and going -------------------------------------------------------------------------------------

    def join(self, joining: list[tuple[Sequence, int, int]], step: int) -> None:
        """Takes in sequences, each with its `min_len` and `max_len`, that draw in `step`, the last to be scheduled, and
        have computed all before. Those with two tokens on their way draw in the step before that as well."""
        sequences = [seq for seq, _, _ in joining]
        for seq in sequences:
            needed = self._blocks.blocks_for(seq.num_computed)
            assert len(seq.block_table) == needed, "a sequence has blocks that it does not need yet"
            self._first_step[seq.row] = step - seq.num_pending + 1
        new = Columns(
            row=np.array([seq.row for seq in sequences], np.int32),
            length=np.array([len(seq.token_ids) for seq in sequences], np.int32),
            known=np.array([seq.num_known for seq in sequences], np.int32),
            max_len=np.array([max_len for _, _, max_len in joining], np.int32),
            min_len=np.array([min_len for _, min_len, _ in joining], np.int32),
            borrowed=np.array([seq.num_borrowed for seq in sequences], np.int32),
            num_prompt=np.array([seq.num_prompt for seq in sequences], np.int32),
            next_token=np.array([seq.token_ids[-1] for seq in sequences], np.int32),
            heeds_eos=np.array([not seq.request.params.ignore_eos for seq in sequences], np.bool_),
        )
        columns = Columns._make(map(np.concatenate, zip(self._now(), new, strict=True)))
        self._settle(Members.of(self._members.sequences + sequences, columns))

    def leave(self, leaving: list[Sequence]) -> None:
        """Writes to members what has become of them, and lets them go."""
        stays = np.ones(len(self), np.bool_)
        for seq in leaving:
            stays[self._member[seq.row]] = False
            self._write_back(seq)
            self._first_step[seq.row] = _NEVER
            self._blocks.commit(seq)
        kept = np.flatnonzero(stays)
        self._settle(self._members.only(kept.tolist(), Columns._make(column[kept] for column in self._now())))

    def _settle(self, members: Members) -> None:
        """From now on these are the members: `length` and `known` are counted from their `start`."""
        self._members, start = members, members.start
        self._member[start.row] = np.arange(len(start.row), dtype=np.int32)
        self._made = self._taken = 0  # steps since: that were made; whose results all members have taken in
        self._known = start.known.copy()
        self._tokens: Ints | None = start.next_token
        self._first_complete = int((start.max_len - start.length).min()) if len(start.row) else 0
        # A member needs a block in every `block_size`-th step: in those whose number leaves this remainder.
        size = self._blocks.block_size
        self._turn = (1 - start.length) % size
        self._num_in_turn: list[int] = np.bincount(self._turn, minlength=size).tolist()

    def _now(self) -> Columns:
        return self._members.start._replace(
            length=self._members.start.length + np.int32(self._made),
            known=self._known + np.int32(self._taken),
            next_token=_drawn(len(self)) if self._tokens is None else self._tokens,
        )

    def _write_back(self, seq: Sequence) -> None:
        i = int(self._member[seq.row])
        length, known = int(self._members.start.length[i]) + self._made, int(self._known[i]) + self._taken
        del seq.token_ids[seq.num_known :]
        end = self._seen - self._log_start + 1
        new = known - len(seq.token_ids)
        seq.token_ids += self._log[end - new : end, seq.row].tolist()
        # Only the last of the tokens on their way is looked up: it is its step that comes next.
        next_token = ~i if self._tokens is None else int(self._tokens[i])
        seq.token_ids += [next_token] * (length - known)
        seq.num_pending = length - known
        seq.num_computed = length - 1

    # ---- a step is made ---------------------------------------------------------------------------------------

    def complete(self) -> list[Sequence]:
        """Members that compute nothing any more, since their last token is being drawn."""
        if self._made < self._first_complete:
            return []
        start = self._members.start
        at = np.flatnonzero(start.length + self._made >= start.max_len)
        return [self._members.sequences[i] for i in at.tolist()]

    def demand(self) -> int:
        """Blocks that `advance` will take."""
        return self._num_in_turn[self._made % self._blocks.block_size]

    def advance(self, append_blocks: Callable[[Members, NDArray[np.intp], Ints, Ints], None]) -> Advance:
        """Lets every member compute its last token in the next step. Those who need a block for it get one, of which
        `append_blocks` is told: the members, which of them, the places in their tables, the blocks."""
        members, size = self._members, self._blocks.block_size
        step = Advance(members, self._made, self._tokens, continues=members is self._last)
        if self.demand():
            step.grown = np.flatnonzero(self._turn == self._made % size)
            step.blocks = np.array(self._blocks.extend([members.sequences[i] for i in step.grown.tolist()]), np.int32)
            places = (members.start.length[step.grown] + np.int32(self._made - 1)) // np.int32(size)
            append_blocks(members, step.grown, places, step.blocks)
        self._made += 1
        self._tokens = None
        self._last = members
        return step

    def interrupted(self) -> None:
        """The step that was just made is not the members' alone."""
        self._last = None

    # ---- a step comes back ------------------------------------------------------------------------------------

    def take(
        self, step: int, members: Members | None, sample_rows: Ints, tokens: Ints
    ) -> tuple[list[TokenOutput], list[tuple[int, Sequence]], list[int]]:
        """Takes in the `tokens` that the samples of a step drew, first those of the `members` at that time.

        Returns what members drew, those of them that this completes with their place there, and the samples of others.
        """
        if self._log_start < 0 or step - self._log_start == _LOG_STEPS:
            for seq in self._members.sequences:
                self._write_back(seq)
            self._log_start = step
        self._seen = step
        drawing, start = self._members, self._members.start
        at: slice | Ints = slice(None)
        if members is drawing:  # nobody has come or gone since: all have drawn in this step, and in each after it
            count = len(start.row)
            others, tokens = list(range(count, len(tokens))), tokens[:count]
            self._taken += 1
            if int(self._known[0]) + self._taken == int(start.length[0]) + self._made:
                self._tokens = tokens
        else:
            is_mine = self._first_step[sample_rows] <= step
            others = np.flatnonzero(~is_mine).tolist()
            tokens, at = tokens[is_mine], self._member[sample_rows[is_mine]]
            self._known[at] += 1
            seen = self._known[at] + self._taken == start.length[at] + self._made
            if seen.any():  # else the next token to compute is one that is drawn later
                self._tokens = self._now().next_token.copy()
                self._tokens[at] = np.where(seen, tokens, self._tokens[at])
            drawing = drawing.only(at.tolist(), Columns._make(column[at] for column in start))
        self._log[step - self._log_start, drawing.start.row] = tokens
        completes = (self._known[at] + self._taken >= drawing.start.max_len) | (tokens < 0)  # none could be sampled
        for eos in self._eos:
            completes |= (tokens == eos) & drawing.start.heeds_eos
        for i, stops in drawing.watched:
            completes[i] |= int(tokens[i]) in stops
        # In C, since in steps of hundreds of rows this is what takes longest.
        none = repeat(None)
        outputs = list(zip(drawing.request_ids, drawing.indexes, tokens.tolist(), none, none, none, strict=False))
        return outputs, [(i, drawing.sequences[i]) for i in np.flatnonzero(completes).tolist()], others

    # ---- for others to know -----------------------------------------------------------------------------------

    def computed(self) -> tuple[Ints, Ints]:
        """The members' rows, and how many of their tokens have their K/V in blocks."""
        return self._members.start.row, self._members.start.length + np.int32(self._made - 1)

    def growth(self) -> Growth:
        start = self._members.start
        length = start.length + np.int32(self._made)
        held = -((1 - length) // np.int32(self._blocks.block_size)) - start.borrowed
        return Growth(held, start.max_len - length, np.maximum(start.min_len - length, np.int32(0)))

    def empty_slots(self) -> int:
        """Slots in the members' blocks that no token fills."""
        return int(((self._turn - self._made) % self._blocks.block_size).sum())
