"""Preemption by copying blocks to host memory: whose blocks lie in which host blocks, and when that is worth it.

Host blocks are numbers here; `runner/kv_cache` holds the memory and makes the copies that a Batch names. The sequences
of a request go and come back together, and blocks that they share are copied once and shared again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.config import EngineConfig, PreemptionMode
from octavo.engine.block_manager import BlockManager
from octavo.request import Sequence

# Bytes a second between a device's cache and host memory, one way; bytes a second of host memory that is made, which
# beside a GPU is pinned; and floating-point operations a second in prefill. Measured on two CPU cores and on an H100
# (docs/decisions/0071). Other machines differ by a factor of a few.
LINK_BYTES = {"cpu": 1.3e9, "cuda": 39e9}
MADE_BYTES = {"cpu": float("inf"), "cuda": 2.4e9}
PREFILL_FLOPS = {"cpu": 8e10, "cuda": 6e14}


@dataclass(frozen=True, slots=True)
class SwapCost:
    """Seconds that either kind of preemption costs."""

    per_block: float  # out and back
    per_token: float  # to compute again
    per_new_block: float = 0.0  # to make its place in host memory, once

    @classmethod
    def of(cls, config: EngineConfig) -> "SwapCost":
        block_bytes = config.model.kv_bytes_per_token(config.kv_dtype) * config.block_size
        return cls(
            per_block=2 * block_bytes / LINK_BYTES[config.device],
            per_token=2 * config.model.num_parameters() / PREFILL_FLOPS[config.device],
            per_new_block=block_bytes / MADE_BYTES[config.device],
        )


class SwapSpace:
    """The host blocks: each is free or holds what a waiting request has computed."""

    def __init__(self, num_blocks: int, mode: PreemptionMode, cost: SwapCost):
        self.num_blocks = num_blocks
        self._mode = mode
        self._cost = cost
        self._free = list(range(num_blocks - 1, -1, -1))  # those that were used before are taken first
        self._num_made = 0  # blocks that have ever been used
        self._forgone = 0.0  # seconds that swaps would have saved, had their memory been there

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def suits(self, sequences: list[Sequence], blocks: BlockManager) -> bool:
        """Whether `sequences`, all of a request, should go to host memory and not be computed again.

        Asked once for each preemption: host memory is made when enough have gone without it to pay for that.
        """
        leader = sequences[0]
        if self._mode == "recompute" or leader.num_computed < leader.fills:
            return False  # a block that is still to be filled for siblings is nothing to keep
        used = len(_computed_blocks(sequences, blocks))
        if not 0 < used <= len(self._free):
            return False
        if self._mode == "swap":
            return True
        lost = blocks.computed_tokens(sequences, exclusive=True)
        saved = lost * self._cost.per_token - used * self._cost.per_block
        if saved <= 0:
            return False
        new = max(0, self.num_used + used - self._num_made)
        if new and self._cost.per_new_block:
            making = new * self._cost.per_new_block
            self._forgone += saved
            if self._forgone < making:
                return False
            self._forgone -= making
        return True

    def take_out(self, sequences: list[Sequence], blocks: BlockManager) -> list[tuple[int, int]]:
        """Moves `sequences` to host blocks and frees their own; the (device, host) copies to make."""
        host = {block: self._free.pop() for block in _computed_blocks(sequences, blocks)}
        self._num_made = max(self._num_made, self.num_used)
        for seq in sequences:
            seq.host_table = [host[block] for block in seq.block_table[: blocks.blocks_for(seq.num_computed)]]
            blocks.release(seq)
        return list(host.items())

    def bring_back(self, sequences: list[Sequence], blocks: BlockManager) -> list[tuple[int, int]] | None:
        """The reverse of `take_out`; None, and nothing moved, if blocks are short."""
        copies = blocks.restore(sequences)
        if copies is not None:
            self.drop(sequences)
        return copies

    def drop(self, sequences: Iterable[Sequence], staying: Iterable[Sequence] = ()) -> None:
        """Frees the host blocks of `sequences`, except those that `staying` ones of the request share."""
        gone = list(sequences)
        kept = {host for seq in staying for host in seq.host_table}
        self._free += {host for seq in gone for host in seq.host_table} - kept
        for seq in gone:
            seq.host_table = []

    def check(self, requests: Iterable[list[Sequence]]) -> None:
        """Asserts that each host block is free or held by the sequences of one of `requests`. For tests."""
        held = [host for sequences in requests for host in {h for seq in sequences for h in seq.host_table}]
        assert sorted(held + self._free) == list(range(self.num_blocks)), "host blocks were lost or given twice"


def _computed_blocks(sequences: list[Sequence], blocks: BlockManager) -> list[int]:
    """The blocks that hold K/V of `sequences`, each once."""
    tables = (seq.block_table[: blocks.blocks_for(seq.num_computed)] for seq in sequences)
    return list(dict.fromkeys(block for table in tables for block in table))
