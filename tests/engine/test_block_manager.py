"""The block manager under random operations, and the order in which it reuses blocks."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import BlockManager
from octavo.request import Request, Sequence
from octavo.sampling_params import SamplingParams


def sequence(tokens, name="r"):
    return Sequence(Request(name, list(tokens), SamplingParams()), 0, 0, list(tokens), len(tokens))


class RandomTraffic(RuleBasedStateMachine):
    """Takes, grows, forks, frees and looks up, and keeps beside the manager what each block should hold."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(12, 2)
        self.live = []
        self.content = {}

    @invariant()
    def all_invariants_hold(self):
        self.blocks.check(self.live)

    @invariant()
    def no_block_that_holds_computed_tokens_was_overwritten(self):
        for seq in self.live:
            for i in range(seq.num_computed // 2):
                assert self.content[seq.block_table[i]] == tuple(seq.token_ids[: 2 * i + 2])

    def compute(self, seq):
        for source, destination in self.blocks.grow(seq):
            self.content[destination] = self.content.get(source)
        seq.num_computed = seq.num_tokens
        for i in range(seq.num_computed // 2):
            self.content[seq.block_table[i]] = tuple(seq.token_ids[: 2 * i + 2])
        self.blocks.commit(seq)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, tokens):
        seq = sequence(tokens)
        hits = self.blocks.match_prefix(seq)
        assert len(hits) * 2 < len(tokens)
        for i, block in enumerate(hits):
            assert self.content[block] == tuple(tokens[: 2 * i + 2])
        if self.blocks.take(seq, hits, seq.num_tokens):
            self.live.append(seq)
            self.compute(seq)
        else:
            assert seq.block_table == []

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        seq = data.draw(st.sampled_from(self.live))
        seq.token_ids.append(token)
        if self.blocks.demand([seq]) <= self.blocks.num_available:
            before = self.blocks.num_available
            demand = self.blocks.demand([seq])
            self.compute(seq)
            assert self.blocks.num_available == before - demand
        else:
            seq.token_ids.pop()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.live))
        child = sequence(parent.token_ids)
        self.blocks.fork(parent, child)
        self.live.append(child)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.blocks.free(seq)

    @rule()
    def forget(self):
        self.blocks.reset_prefix_cache()


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_reuse_takes_blocks_without_a_hash_first_then_the_least_recently_used_tail():
    blocks = BlockManager(8, 2)
    old, new = sequence([1] * 5), sequence([2] * 5)
    for seq in (old, new):
        blocks.take(seq, [], 5)
        seq.num_computed = 5
        blocks.commit(seq)
    old_table, new_table = old.block_table, new.block_table
    blocks.free(old)
    blocks.free(new)
    assert (blocks.num_free, blocks.num_cached) == (4, 4)
    third = sequence(range(16))
    blocks.take(third, [], 16)
    # Two blocks were never used, two are half-filled tails; then old's and new's hashed blocks from the tail on.
    assert third.block_table[4:] == [old_table[1], old_table[0], new_table[1], new_table[0]]
    assert blocks.match_prefix(old) == []


def test_a_hit_is_taken_from_the_middle_of_the_free_queue():
    blocks = BlockManager(4, 2)
    seq = sequence([1, 2, 3, 4, 5])
    blocks.take(seq, [], 5)
    seq.num_computed = 5
    blocks.commit(seq)
    table = seq.block_table
    blocks.free(seq)
    again = sequence([1, 2, 3, 4, 9])
    assert blocks.match_prefix(again) == table[:2]
    assert blocks.take(again, table[:2], 5)
    assert again.num_computed == 4
    blocks.check([again])


def test_taking_counts_cached_hits_as_taken():
    blocks = BlockManager(3, 2)
    seq = sequence([1, 2, 3, 4, 5])
    blocks.take(seq, [], 5)
    seq.num_computed = 5
    blocks.commit(seq)
    blocks.free(seq)
    longer = sequence([1, 2, 3, 4, 5, 6, 7])
    assert not blocks.take(longer, blocks.match_prefix(longer), 7)
    blocks.check([])


def test_empty_slots_of_half_filled_and_shared_blocks() -> None:
    blocks = BlockManager(16, 4)
    first = sequence(range(10))
    assert blocks.take(first, [], 10)
    assert blocks.empty_slots([first]) == 12
    first.num_computed = 6
    assert blocks.empty_slots([first]) == 6
    first.num_computed = 10
    fork = sequence(range(10))
    blocks.fork(first, fork)
    assert blocks.empty_slots([first, fork]) == 2, "the shared last block counts once"
