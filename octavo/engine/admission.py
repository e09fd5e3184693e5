"""Blocks for a request that joins: what the prefix cache or the disk has, what it left in host memory, new ones.

Whether it is its turn, and whether everybody will still fit later, is the scheduler's to say.
"""

from collections.abc import Callable

from octavo.engine.block_manager import BlockManager
from octavo.engine.prefix_store import PrefixStore
from octavo.engine.state import Plan, RequestState
from octavo.engine.swap import SwapSpace
from octavo.metrics import EngineStats
from octavo.request import Sequence

Fits = Callable[[RequestState, int], bool]  # whether a request may join that shares so many blocks owned already


class Admission:
    """Counts in `stats` what it moves."""

    def __init__(self, blocks: BlockManager, swap: SwapSpace, store: PrefixStore | None, stats: EngineStats):
        self._blocks = blocks
        self._swap = swap
        self._store = store
        self._stats = stats
        if store is not None:
            blocks.track_cold()

    def take_back(self, state: RequestState, plan: Plan, fits: Fits) -> bool:
        """Blocks for what a request left in host memory, and the copies; False if there are too few."""
        if not fits(state, 0):
            return False
        copies = self._swap.bring_back(state.sequences, self._blocks)
        if copies is None:
            return False
        plan.swap_in += copies
        self._stats.blocks_swapped_in += len(copies)
        return True

    def take(self, state: RequestState, plan: Plan, fits: Fits) -> int | None:
        """Blocks for a request that has none; how many of its tokens were found in them, or None if they are short."""
        leader, *siblings = state.sequences
        # A sequence that must show its prompt's logprobs has to compute all of it.
        hits = [] if leader.wants_prompt_logprobs else self._blocks.match_prefix(leader)
        if not fits(state, self._blocks.count_owned(hits)):
            return None
        taken = self._blocks.take(leader, hits, leader.num_tokens)
        # After a preemption the samples share the full blocks of their common beginning again; the first of them fills
        # these.
        shared = state.num_common // self._blocks.block_size if siblings else 0
        leader.fills = shared * self._blocks.block_size
        for seq in siblings:
            hits = self._blocks.match_prefix(seq)
            taken = taken and self._blocks.take(
                seq, hits if len(hits) > shared else leader.block_table[:shared], seq.num_tokens
            )
        if not taken:
            for seq in state.sequences:
                self._blocks.free(seq)
            return None
        if not leader.wants_prompt_logprobs:
            self._load(leader, plan)
        return sum(seq.num_computed for seq in state.sequences) - len(siblings) * leader.fills

    def _load(self, seq: Sequence, plan: Plan) -> None:
        """Goes on where the prefix cache ended with what the prefix store has."""
        if self._store is None:
            return
        size = self._blocks.block_size
        for i in range(seq.num_computed // size, (seq.num_tokens - 1) // size):
            if (content := self._store.read(seq.block_hashes[i])) is None:
                break
            plan.loads.append((seq.block_table[i], content))
            seq.num_computed += size
            self._stats.blocks_loaded += 1

    def cold_blocks(self, most: int) -> list[tuple[bytes, int]]:
        """Up to `most` blocks that the prefix store lacks and nobody owns, by hash; to be read before the next step."""
        found: list[tuple[bytes, int]] = []
        while self._store is not None and len(found) < most and (cold := self._blocks.pop_cold()) is not None:
            if not self._store.has(cold[0]):
                found.append(cold)
        return found
