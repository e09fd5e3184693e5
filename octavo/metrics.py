"""What the engine counts. The server renders these for Prometheus; the log and `octavo bench` read them as they are."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """State now, and totals since the start. Tokens and blocks are counts; times are seconds."""

    running: int = 0  # requests with blocks
    waiting: int = 0  # requests without
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_owned: int = 0
    block_size: int = 0  # tokens in a block
    empty_slots: int = 0  # slots of owned blocks in which no token is stored (internal fragmentation)
    block_references: int = 0  # entries of all block tables: what would be owned if nothing were shared
    host_blocks_used: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # of admitted requests
    output_tokens: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0  # by either kind
    wasted_tokens: int = 0  # computed again after a preemption
    swaps: int = 0  # preemptions that kept the K/V in host memory
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    blocks_loaded: int = 0  # from the prefix store on disk
    blocks_saved: int = 0  # to it
    owned_block_steps: int = 0  # sums over the steps of blocks_owned and block_references
    referenced_block_steps: int = 0

    def count_step(self, num_samples: int, owned: int, references: int) -> None:
        """Notes a step that drew for `num_samples` rows and left so many blocks owned, and references to them."""
        self.steps += 1
        self.output_tokens += num_samples
        self.owned_block_steps += owned
        self.referenced_block_steps += references

    def share_saved(self, since: "EngineStats | None" = None) -> float:
        """The part of all block references, over all steps or those `since` then, that took no block of its own."""
        owned = self.owned_block_steps - (since.owned_block_steps if since else 0)
        referenced = self.referenced_block_steps - (since.referenced_block_steps if since else 0)
        return 1 - owned / referenced if referenced else 0.0

    @property
    def stored_tokens(self) -> int:
        """Tokens with K/V in owned blocks; what several sequences share counts once."""
        return self.blocks_owned * self.block_size - self.empty_slots

    @property
    def waste(self) -> float:
        """The part of the owned blocks' slots in which no token is stored."""
        return self.empty_slots / slots if (slots := self.blocks_owned * self.block_size) else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_lookup_tokens if self.prefix_lookup_tokens else 0.0
