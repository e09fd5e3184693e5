"""The paged KV cache's bookkeeping: which block belongs to whom, and which freed block still holds something useful.

A block holds the K/V of `block_size` tokens. It is *owned* (some sequence's table names it), *cached* (nobody owns it,
but its content is known by a hash and can be taken up again) or *free*. A full block's hash chains its parent's hash
with its own tokens, so equal hashes mean equal beginnings. Nothing here knows of requests' order, budgets or tensors.

    free_queue   reused first -> [ no hash | no hash | hash, oldest | ... | hash, newest ]
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

from octavo.request import Sequence


class BlockManager:
    """Allocates, shares, caches and frees blocks. Invariant: free + cached + owned = `num_blocks`."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_count = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Blocks that nobody owns, in the order of reuse; a hit is taken from the middle in O(1).
        self._free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_cached = 0
        self._num_references = 0
        self._cold: dict[bytes, int] | None = None

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: the free and the cached ones."""
        return len(self._free_queue)

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_free(self) -> int:
        return len(self._free_queue) - self._num_cached

    @property
    def num_owned(self) -> int:
        return self.num_blocks - len(self._free_queue)

    @property
    def num_references(self) -> int:
        """Entries of all block tables: the blocks that would be owned if nothing were shared."""
        return self._num_references

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def count_owned(self, blocks: Collection[int]) -> int:
        """How many of `blocks` somebody owns now."""
        return sum(1 for block in blocks if self._ref_count[block])

    def computed_tokens(self, sequences: list[Sequence], *, exclusive: bool = False) -> int:
        """Tokens of `sequences` with K/V in blocks, each block counted once; `exclusive`: only what nobody else holds.

        The exclusive ones are what freeing all of `sequences` may cost to compute again.
        """
        holders: dict[int, int] = {}
        filled: dict[int, int] = {}
        for seq in sequences:
            for i, block in enumerate(seq.block_table):
                holders[block] = holders.get(block, 0) + 1
                tokens = min(self.block_size, max(0, seq.num_computed - i * self.block_size))
                filled[block] = min(tokens, filled.get(block, self.block_size))
        return sum(n for block, n in filled.items() if not exclusive or holders[block] == self._ref_count[block])

    def empty_slots(self, sequences: Iterable[Sequence]) -> int:
        """Slots in the blocks of `sequences` that no token fills yet, each block counted once."""
        filled: dict[int, int] = {}
        for seq in sequences:
            for i in range(seq.num_computed // self.block_size, len(seq.block_table)):
                tokens = max(0, seq.num_computed - i * self.block_size)
                # Whoever has yet to fill a block that others share knows best how far it is.
                filled[seq.block_table[i]] = min(tokens, filled.get(seq.block_table[i], tokens))
        return len(filled) * self.block_size - sum(filled.values())

    # ---- the prefix cache -------------------------------------------------------------------------------------

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that already hold the beginning of `seq`, without taking them.

        At least one token is always left to compute, since its logits are needed.
        """
        if not self.enable_prefix_caching:
            return []
        self._hash_blocks(seq, (seq.num_tokens - 1) // self.block_size)
        found = []
        for block_hash in seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def commit(self, seq: Sequence) -> None:
        """Makes the blocks that `seq` has filled by now findable by others.

        A block is filled once a step that writes it has been scheduled, since steps run in order; and only known
        tokens have a hash.
        """
        if not self.enable_prefix_caching:
            return
        full = min(seq.num_computed, seq.num_known) // self.block_size
        if full <= seq.num_committed:
            return
        self._hash_blocks(seq, full)
        for i in range(seq.num_committed, full):
            block, block_hash = seq.block_table[i], seq.block_hashes[i]
            # Equal content computed twice: the first block stays the one that is found.
            if self._hash_of[block] is None and block_hash not in self._block_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block
        seq.num_committed = full

    def track_cold(self) -> None:
        """From now on remembers which hashed blocks have been let go by their last owner, for `pop_cold`."""
        self._cold = {}

    def pop_cold(self) -> tuple[bytes, int] | None:
        """The hash and number of the block that was let go first, and has not been handed out again; None if none."""
        if not self._cold:
            return None
        block_hash = next(iter(self._cold))
        return block_hash, self._cold.pop(block_hash)

    def _hash_blocks(self, seq: Sequence, count: int) -> None:
        """Extends `seq.block_hashes` to its first `count` blocks."""
        hashes, size = seq.block_hashes, self.block_size
        if len(hashes) >= count:
            return
        parent = hashes[-1] if hashes else _root(seq)
        tokens = array("i", seq.token_ids[len(hashes) * size : count * size])
        content, step = tokens.tobytes(), size * tokens.itemsize
        for start in range(0, len(content), step):
            parent = hashlib.blake2b(parent + content[start : start + step], digest_size=16).digest()
            hashes.append(parent)

    # ---- owning -----------------------------------------------------------------------------------------------

    def take(self, seq: Sequence, shared: list[int], num_tokens: int) -> bool:
        """Gives `seq` the blocks `shared` and new ones up to `num_tokens` tokens; False, and nothing, if short."""
        assert not seq.block_table, "take() is for a sequence without blocks"
        idle = len(shared) - self.count_owned(shared)
        new = self.blocks_for(num_tokens) - len(shared)
        if idle + new > self.num_available:
            return False
        seq.num_borrowed = len(shared) - idle
        for block in shared:
            self._own(block)
        seq.block_table = shared + [self._pop() for _ in range(new)]
        seq.num_computed = len(shared) * self.block_size
        seq.num_committed = len(shared)
        return True

    def demand(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that `grow` will take for all of `sequences` together, copies of shared blocks among them."""
        new, size = 0, self.block_size
        writers: Counter[int] = Counter()
        for seq in sequences:  # all that run, in every step: hence without calls
            table, at = seq.block_table, seq.num_computed // size
            new -= -len(seq.token_ids) // size + len(table)
            if at < len(table) and self._ref_count[table[at]] > 1 and seq.num_computed >= seq.fills:
                writers[table[at]] += 1
        # If all owners write, the last of them finds itself the only one and needs no copy.
        return new + sum(min(count, self._ref_count[block] - 1) for block, count in writers.items())

    def grow(self, seq: Sequence) -> list[tuple[int, int]]:
        """Makes `seq`'s table cover its known tokens, and the slots it writes next its own.

        Returns the (source, destination) block copies that the step must make first. The caller has checked `demand`
        against `num_available`.
        """
        shared = self.writes_shared(seq)
        if len(seq.token_ids) <= len(seq.block_table) * self.block_size and not shared:
            return []
        copies = []
        if shared:
            i = seq.num_computed // self.block_size
            source, seq.block_table[i] = seq.block_table[i], self._pop()
            self._release(source)
            copies.append((source, seq.block_table[i]))
        for _ in range(self.blocks_for(seq.num_tokens) - len(seq.block_table)):
            seq.block_table.append(self._pop())
        return copies

    def extend(self, sequences: list[Sequence]) -> list[int]:
        """Gives each of `sequences`, whose blocks are full, one more: these blocks."""
        new = [self._pop() for _ in sequences]
        for seq, block in zip(sequences, new, strict=True):
            seq.block_table.append(block)
        return new

    def writes_shared(self, seq: Sequence) -> bool:
        """Whether the next token of `seq` falls into a block that others own as well, and not for it to fill."""
        if seq.num_computed < seq.fills:
            return False
        i, table = seq.num_computed // self.block_size, seq.block_table
        return i < len(table) and self._ref_count[table[i]] > 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child` share all of `parent`'s blocks; the first of them to write into one gets a copy."""
        child.block_table = list(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_computed = parent.num_computed
        child.num_committed = parent.num_committed
        child.num_borrowed = len(child.block_table)
        for block in child.block_table:
            self._own(block)

    def free(self, seq: Sequence) -> None:
        """Gives `seq`'s blocks back, tail first: what is nearest a prompt's beginning is evicted last."""
        self.release(seq)
        seq.num_computed = seq.fills = 0

    def release(self, seq: Sequence) -> None:
        """As `free`, but what `seq` has computed still counts: its K/V has been copied elsewhere."""
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table = []
        seq.num_committed = seq.num_borrowed = 0

    def restore(self, sequences: list[Sequence]) -> list[tuple[int, int]] | None:
        """Gives swapped-out `sequences` blocks again, one for each that their `host_table`s name, shared as there.

        What the prefix cache still holds is taken from it. Returns the (device, host) copies that the step must make
        first; None, and nothing taken, if blocks are short for this and for what the sequences write next.
        """
        device: dict[int, int] = {}  # of a host block: the block that holds the same
        for seq in sequences:
            full = seq.num_computed // self.block_size
            device.update(zip(seq.host_table[:full], self.match_prefix(seq), strict=False))
        hits = frozenset(device)
        found = set(device.values())
        idle = len(found) - self.count_owned(found)
        missing = {host for seq in sequences for host in seq.host_table} - hits
        if len(missing) + idle + self._demand_once_restored(sequences) > self.num_available:
            return None
        for seq in sequences:  # before any is handed out anew
            for host in hits.intersection(seq.host_table):
                self._share(seq, device[host])
        copies = []
        for seq in sequences:
            for host in seq.host_table:
                if host not in device:
                    device[host] = self._pop()
                    copies.append((device[host], host))
                elif host not in hits:
                    self._share(seq, device[host])
            seq.block_table = [device[host] for host in seq.host_table]
            seq.num_committed = 0
        return copies

    def _demand_once_restored(self, sequences: list[Sequence]) -> int:
        """What `demand` will say when `sequences` have blocks as their `host_table`s name them."""
        new = 0
        writers: Counter[int] = Counter()
        owners: Counter[int] = Counter()
        for seq in sequences:
            new += self.blocks_for(seq.num_tokens) - len(seq.host_table)
            owners.update(seq.host_table)
            i = seq.num_computed // self.block_size
            if i < len(seq.host_table):
                writers[seq.host_table[i]] += 1
        return new + sum(min(count, owners[host] - 1) for host, count in writers.items())

    def _share(self, seq: Sequence, block: int) -> None:
        seq.num_borrowed += self._ref_count[block] > 0
        self._own(block)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content; owned blocks stay owned and lose their hashes."""
        self._hash_of = [None] * self.num_blocks
        self._block_of.clear()
        self._num_cached = 0
        if self._cold:
            self._cold.clear()

    def _own(self, block: int) -> None:
        if self._ref_count[block] == 0:
            del self._free_queue[block]
            self._num_cached -= self._hash_of[block] is not None
        self._ref_count[block] += 1
        self._num_references += 1

    def _pop(self) -> int:
        block, _ = self._free_queue.popitem(last=False)
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
            self._num_cached -= 1
            if self._cold:
                self._cold.pop(block_hash, None)
        self._ref_count[block] = 1
        self._num_references += 1
        return block

    def _release(self, block: int) -> None:
        self._ref_count[block] -= 1
        self._num_references -= 1
        assert self._ref_count[block] >= 0, f"block {block} freed twice"
        if self._ref_count[block]:
            return
        self._free_queue[block] = None
        block_hash = self._hash_of[block]
        if block_hash is None:
            self._free_queue.move_to_end(block, last=False)
        else:
            self._num_cached += 1
            if self._cold is not None:
                self._cold[block_hash] = block

    # ---- integrity --------------------------------------------------------------------------------------------

    def check(self, sequences: list[Sequence]) -> None:
        """Asserts every invariant against `sequences`, all that own blocks. For tests: O(blocks)."""
        owners = [0] * self.num_blocks
        for seq in sequences:
            assert len(seq.block_table) == len(set(seq.block_table)), "a table names a block twice"
            for block in seq.block_table:
                owners[block] += 1
        assert owners == self._ref_count, "reference counts differ from the tables"
        assert self._num_references == sum(owners)
        unowned = {block for block in range(self.num_blocks) if not owners[block]}
        assert unowned == set(self._free_queue), "the free queue is not the unowned blocks"
        cached = {block for block in unowned if self._hash_of[block] is not None}
        assert len(cached) == self._num_cached
        assert self.num_free + self.num_cached + self.num_owned == self.num_blocks
        hashed = {h: block for block, h in enumerate(self._hash_of) if h is not None}
        assert hashed == self._block_of, "hashes and blocks disagree"


def _root(seq: Sequence) -> bytes:
    """The parent hash of a sequence's first block: what besides its tokens makes its K/V what they are."""
    return repr((seq.request.cache_salt, seq.ntk_alpha)).encode()
