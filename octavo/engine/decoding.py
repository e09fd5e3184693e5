"""Sequences that draw a token in every step, as columns: hundreds of them go forward in a few array operations.

A request that does nothing but decode joins with all its samples, and leaves when it ends, is aborted or preempted.
While it is here the columns are the truth. Its `Sequence`s keep their block tables, but `token_ids`, `num_computed` and
`num_pending` stay as they were until `leave` or `flush` writes them, and full blocks are offered to the prefix cache by
`leave` alone. A member's last token is always the only one to compute.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Ints, SamplingColumns
from octavo.engine.block_manager import BlockManager
from octavo.request import Sequence, TokenOutput

_NEVER = np.iinfo(np.int64).max
# Steps whose tokens are kept before they are written to their sequences.
_LOG_STEPS = 256


@dataclass(slots=True, eq=False)
class Members:
    """Who is here, until somebody comes or goes, in the order of their tokens and samples in a step. M members."""

    sequences: list[Sequence] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)  # of the sample in its request
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # [M] in the row table
    watched: list[tuple[int, frozenset[int]]] = field(default_factory=list)  # (member, its own stop tokens)
    sampling: SamplingColumns | None = None  # what does not change of it; filled in by the row table

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Members":
        stops = ((i, frozenset(seq.request.params.stop_token_ids)) for i, seq in enumerate(sequences))
        return cls(
            sequences,
            [seq.request.request_id for seq in sequences],
            [seq.index for seq in sequences],
            np.array([seq.row for seq in sequences], np.int32),
            [(i, tokens) for i, tokens in stops if tokens],
        )

    def only(self, kept: list[int]) -> "Members":
        """Those numbered so, in that order."""
        place = {member: i for i, member in enumerate(kept)} if self.watched else {}
        return Members(
            [self.sequences[i] for i in kept],
            [self.request_ids[i] for i in kept],
            [self.indexes[i] for i in kept],
            self.rows[kept],
            [(place[i], stops) for i, stops in self.watched if i in place],
        )


@dataclass(slots=True)
class Advance:
    """What the members compute in one step."""

    members: Members
    token_ids: Ints  # [M] as in `Batch`
    positions: Ints  # [M]
    slots: Ints  # [M]
    counter: Ints  # [M]
    continues: bool  # whether the step before was theirs as well, with the same members


_NONE = np.empty(0, np.int32)
NOBODY = Advance(Members(), token_ids=_NONE, positions=_NONE, slots=_NONE, counter=_NONE, continues=False)


class Decoding:
    """Columns for at most `max_rows` sequences. Steps are numbered, and their results come in that order."""

    def __init__(self, max_rows: int, blocks: BlockManager, eos_token_ids: frozenset[int]):
        self._blocks = blocks
        self._eos = sorted(eos_token_ids)
        self._members = Members()
        # By member. `length` counts the tokens that are still being drawn, `known` does not.
        self._length, self._known, self._max_len, self._num_prompt, self._room, self._slot, self._next_token = (
            np.zeros(max_rows, np.int32) for _ in range(7)
        )
        self._heeds_eos = np.zeros(max_rows, np.bool_)
        # By row of the row table: the first step whose result is taken in here, and the member.
        self._first_step = np.full(max_rows, _NEVER)
        self._member = np.zeros(max_rows, np.int32)
        self._log = np.zeros((_LOG_STEPS, max_rows), np.int32)
        self._log_start = self._seen = -1  # number of the step in the log's first line; of the last that was taken in
        self._last: Members | None = None  # the members at the last step

    def __len__(self) -> int:
        return len(self._members.sequences)

    def _columns(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self._length,
            self._known,
            self._max_len,
            self._num_prompt,
            self._room,
            self._slot,
            self._next_token,
            self._heeds_eos,
        )

    # ---- coming and going -------------------------------------------------------------------------------------

    def join(self, joining: list[tuple[Sequence, int]], step: int) -> None:
        """Takes in sequences, each with its `max_len`, that draw in `step`, the last to be scheduled, and have computed
        all before. Those with two tokens on their way draw in the step before that as well."""
        first = len(self)
        for i, (seq, max_len) in enumerate(joining, first):
            self._length[i] = len(seq.token_ids)
            self._known[i] = seq.num_known
            self._max_len[i] = max_len
            self._num_prompt[i] = seq.num_prompt
            size, last = self._blocks.block_size, len(seq.block_table) - 1
            self._room[i] = (last + 1) * size
            assert last == (seq.num_computed - 1) // size, "a sequence has blocks that it does not need yet"
            # Of the last token that was computed: the next one's is the next, if the block is not full.
            self._slot[i] = seq.block_table[last] * size + (seq.num_computed - 1) - last * size
            self._next_token[i] = seq.token_ids[-1]
            self._heeds_eos[i] = not seq.request.params.ignore_eos
            self._first_step[seq.row] = step - seq.num_pending + 1
        self._settle(Members.of(self._members.sequences + [seq for seq, _ in joining]))

    def leave(self, leaving: list[Sequence]) -> None:
        """Writes to members what has become of them, and lets them go."""
        stays = np.ones(len(self), np.bool_)
        for seq in leaving:
            stays[self._member[seq.row]] = False
            self._write_back(seq)
            self._first_step[seq.row] = _NEVER
            self._blocks.commit(seq)
        kept = np.flatnonzero(stays)
        for column in self._columns():
            column[: len(kept)] = column[kept]
        self._settle(self._members.only(kept.tolist()))

    def _settle(self, members: Members) -> None:
        self._members = members
        self._member[members.rows] = np.arange(len(members.rows), dtype=np.int32)

    def flush(self) -> None:
        """Writes to all members what has become of them so far."""
        for seq in self._members.sequences:
            self._write_back(seq)

    def _write_back(self, seq: Sequence) -> None:
        i = self._member[seq.row]
        length, known = int(self._length[i]), int(self._known[i])
        del seq.token_ids[seq.num_known :]
        end = self._seen - self._log_start + 1
        new = known - len(seq.token_ids)
        seq.token_ids += self._log[end - new : end, seq.row].tolist()
        # Only the last of the tokens on their way is looked up: it is its step that comes next.
        seq.token_ids += [int(self._next_token[i])] * (length - known)
        seq.num_pending = length - known
        seq.num_computed = length - 1

    # ---- a step is made ---------------------------------------------------------------------------------------

    def complete(self) -> list[Sequence]:
        """Members that compute nothing any more, since their last token is being drawn."""
        count = len(self)
        at = np.flatnonzero(self._length[:count] >= self._max_len[:count])
        return [self._members.sequences[i] for i in at.tolist()]

    def demand(self) -> int:
        """Blocks that `advance` will take."""
        count = len(self)
        return int(np.count_nonzero(self._length[:count] > self._room[:count]))

    def advance(self, append_blocks: Callable[[Members, NDArray[np.intp], Ints, list[int]], None]) -> Advance:
        """Lets every member compute its last token in the next step. Those who need a block for it get one, of which
        `append_blocks` is told: the members, which of them, the places in their tables, the blocks."""
        members, count = self._members, len(self)
        length = self._length[:count]
        full = np.flatnonzero(length > self._room[:count])
        if len(full):
            new = self._blocks.extend([members.sequences[i] for i in full.tolist()])
            append_blocks(members, full, self._room[full] // self._blocks.block_size, new)
            self._room[full] += self._blocks.block_size
        slots = self._slot[:count]
        slots += 1
        if len(full):
            slots[full] = np.array(new, np.int32) * np.int32(self._blocks.block_size)
        step = Advance(
            members,
            token_ids=self._next_token[:count].copy(),
            positions=length - 1,
            slots=slots.copy(),
            counter=length - self._num_prompt[:count],
            continues=members is self._last,
        )
        length += 1
        self._next_token[:count] = np.arange(-1, -1 - count, -1, dtype=np.int32)
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
            self.flush()
            self._log_start = step
        self._seen = step
        if members is self._members:  # nobody has come or gone since
            count = len(members.rows)
            at: slice | Ints = slice(None, count)
            drawing, others, tokens = members, list(range(count, len(tokens))), tokens[:count]
        else:
            is_mine = self._first_step[sample_rows] <= step
            others = np.flatnonzero(~is_mine).tolist()
            tokens, at = tokens[is_mine], self._member[sample_rows[is_mine]]
            drawing = self._members.only(at.tolist())
        self._log[step - self._log_start, drawing.rows] = tokens
        self._known[at] += 1
        known = self._known[at]
        seen = known == self._length[at]
        if seen.any():  # else the next token to compute is one that is drawn later
            self._next_token[at] = np.where(seen, tokens, self._next_token[at])
        completes = known >= self._max_len[at]
        for eos in self._eos:
            completes |= (tokens == eos) & self._heeds_eos[at]
        for i, stops in drawing.watched:
            completes[i] |= int(tokens[i]) in stops
        # In C, since in steps of hundreds of rows this is what takes longest.
        none = repeat(None)
        outputs = list(zip(drawing.request_ids, drawing.indexes, tokens.tolist(), none, none, none, strict=False))
        return outputs, [(i, drawing.sequences[i]) for i in np.flatnonzero(completes).tolist()], others

    def empty_slots(self) -> int:
        """Slots in the members' blocks that no token fills."""
        count = len(self)
        return int((self._room[:count] - self._length[:count] + 1).sum())
