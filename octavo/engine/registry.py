"""Every request from its arrival to its end: who waits, who runs, and who of these only decodes.

With each go the things that it holds: blocks, host blocks, rows. Changes of state are made here and decided elsewhere.
"""

import bisect

import numpy as np

from octavo.config import EngineConfig
from octavo.engine.block_manager import BlockManager
from octavo.engine.decoding import Decoding, Growth
from octavo.engine.fair_share import FairShare
from octavo.engine.rows import RowTable
from octavo.engine.state import RequestState
from octavo.engine.swap import SwapCost, SwapSpace
from octavo.request import FinishReason, Sequence


class Registry:
    """`waiting` is in the queue's order, `running` in that of joining. Both, and `states`, are for others to read."""

    def __init__(self, config: EngineConfig):
        self.blocks = BlockManager(
            config.num_blocks, config.block_size, enable_prefix_caching=config.options.enable_prefix_caching
        )
        self.swap = SwapSpace(config.num_host_blocks, config.options.preemption_mode, SwapCost.of(config))
        self.fair = FairShare(config.max_num_seqs, self.blocks) if config.options.fair_share else None
        eos = config.model.eos_token_ids
        self.rows = RowTable(config.max_num_seqs, config.max_blocks_per_seq, config.block_size, eos)
        self.decoding = Decoding(config.max_num_seqs, self.blocks, frozenset(eos))
        self.states: dict[str, RequestState] = {}
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.must_grow = 0  # tokens that the answers of all who run have at least
        self._num_decoding = 0

    def of(self, seq: Sequence) -> RequestState:
        return self.states[seq.request.request_id]

    @property
    def num_rows(self) -> int:
        """Rows of the running requests, those kept for samples to come among them."""
        return sum(state.num_rows for state in self.running)

    def others(self) -> list[RequestState]:
        """Running requests that do not only decode."""
        if self._num_decoding == len(self.running):
            return []
        return [state for state in self.running if not state.decoding]

    def growth(self) -> Growth:
        """Of the running sequences."""
        others: list[tuple[int, int, int]] = []
        for state in self.others():
            others += state.growth([len(seq.block_table) - seq.num_borrowed for seq in state.sequences])
        both = zip(self.decoding.growth(), Growth.of(others), strict=True)
        return Growth._make(map(np.concatenate, both))

    def exclusive_tokens(self) -> dict[RequestState, int]:
        """Of each running request the tokens with K/V in blocks that no other holds: what it may cost to compute it
        again."""
        rows, computed = self.decoding.computed()
        by_row = np.zeros(self.rows.max_rows, np.int32)
        by_row[rows] = computed
        for state in self.others():
            leader = state.sequences[0]
            filling = leader.num_computed < leader.fills  # blocks that its siblings hold as well, and wait for
            for seq in state.sequences:
                by_row[seq.row] = leader.num_computed if filling else seq.num_computed
        own = [(seq.row, i) for i, state in enumerate(self.running) for seq in state.sequences]
        held_rows, owner = np.array(own, np.int32).reshape(-1, 2).T
        tokens = self.rows.exclusive_tokens(held_rows, by_row[held_rows], owner)
        return dict(zip(self.running, tokens.tolist(), strict=True))

    # ---- coming, running, going -------------------------------------------------------------------------------

    def arrive(self, state: RequestState) -> None:
        """A new request: it waits."""
        self.states[state.request.request_id] = state
        if self.fair is not None:
            self.fair.arrives(state.request.tenant)
        self._enqueue(state)

    def _enqueue(self, state: RequestState) -> None:
        bisect.insort(self.waiting, state, key=lambda waiting: waiting.order)

    def run(self, state: RequestState) -> None:
        """A waiting request, which has been given blocks, runs."""
        for seq in state.sequences:
            self.rows.add(seq)
        self.waiting.remove(state)
        self.running.append(state)
        self.must_grow += state.must_grow

    def withdraw(self, state: RequestState) -> None:
        """A running request, whose blocks have been taken back, waits again at its old place."""
        for seq in state.sequences:
            self.rows.remove(seq)
        self.running.remove(state)
        self.must_grow -= state.must_grow
        self._enqueue(state)

    def start_decoding(self, states: list[RequestState], step: int) -> None:
        """`states` do nothing from now on but compute what they draw, first in `step`."""
        for state in states:
            state.decoding = True
        self._num_decoding += len(states)
        self.decoding.join([(seq, state.min_len, state.max_len) for state in states for seq in state.sequences], step)

    def stop_decoding(self, state: RequestState) -> None:
        """Has `state` run as any other, which may do what it likes; nothing if it does."""
        if state.decoding:
            state.decoding = False
            self._num_decoding -= 1
            self.decoding.leave(state.sequences)

    def split(self, seq: Sequence, child: Sequence) -> None:
        """`child` runs beside `seq`, with all of its blocks."""
        self.blocks.fork(seq, child)
        self.rows.add(child)

    def drop(self, seq: Sequence) -> None:
        """A beam that does not go on gives back what it holds."""
        self.rows.remove(seq)
        self.blocks.free(seq)

    def end(self, state: RequestState, seq: Sequence, reason: FinishReason) -> None:
        """A sequence ends, and its request with the last one. It must have left `decoding`."""
        seq.finish_reason = reason
        if seq.row >= 0:
            self.rows.remove(seq)
        self.blocks.free(seq)
        state.sequences.remove(seq)
        self.swap.drop([seq], state.sequences)
        if state.sequences:
            return
        del self.states[state.request.request_id]
        self._num_decoding -= state.decoding
        if self.fair is not None:
            self.fair.leaves(state.request.tenant)
        if state in self.running:
            self.running.remove(state)
            self.must_grow -= state.must_grow
        else:
            self.waiting.remove(state)

    def check(self) -> None:
        """Asserts the invariants of blocks and host blocks. For tests."""
        self.blocks.check([seq for state in self.states.values() for seq in state.sequences])
        self.swap.check(state.sequences for state in self.states.values())
        assert self._num_decoding == sum(state.decoding for state in self.running)
        assert self.must_grow == sum(state.must_grow for state in self.running)
