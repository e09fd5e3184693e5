"""Blocks that samples and beams share, and requests that give way: counted, and without a change to any answer."""

import itertools

import pytest
from paged_oracle import engine_config, expected, expected_beams
from scheduler_bench import Bench, prompt_of

from octavo.engine.rows import FORK_STRIDE
from octavo.engine.swap import SwapCost, SwapSpace


def test_samples_share_the_prompt_and_copy_its_last_block():
    bench = Bench(num_blocks=40)
    bench.add("n", prompt_of(50), n=8, max_tokens=6)
    bench.step()
    # 12 full blocks once; the last, half-filled one is still shared by all eight.
    assert bench.scheduler.stats().blocks_owned == 13
    batch = bench.step()
    assert len(batch.block_copies) == 7
    assert bench.scheduler.stats().blocks_owned == 12 + 8
    bench.run()
    for k in range(8):
        assert bench.answers["n", k] == expected(prompt_of(50), 6, (1 + k * FORK_STRIDE) % 2**64)


def blocks_of_samples(prompt, lengths, size):
    """Blocks of samples with so many computed tokens each: the prompt's full ones once, the others apart."""
    return prompt // size + sum(-(-length // size) - prompt // size for length in lengths)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("prompt", [500, 512])
def test_eight_samples_hold_a_prompt_once_at_every_step(caching, prompt):
    bench = Bench(
        block_size=16, num_blocks=64, max_model_len=600, max_num_batched_tokens=600, enable_prefix_caching=caching
    )
    bench.add("n", prompt_of(prompt), n=8, max_tokens=40)
    first = bench.step()
    # The prompt once, its half-filled last block too, in eight tables.
    assert bench.scheduler.stats().blocks_owned == first.block_tables.size == 32
    assert bench.scheduler.stats().block_references == 8 * 32
    for length in range(prompt + 1, prompt + 39):
        batch = bench.step()
        # That block is copied for all but the last to write into it, and no other block ever.
        assert len(batch.block_copies) == (7 if length == 501 else 0)
        assert bench.scheduler.stats().blocks_owned == blocks_of_samples(prompt, [length] * 8, 16)
        assert len(set(batch.block_tables.flat)) == blocks_of_samples(prompt, [length] * 8, 16)
        assert bench.scheduler.stats().block_references == 8 * -(-length // 16)
    bench.run()
    for k in range(8):
        assert bench.answers["n", k] == expected(prompt_of(prompt), 40, (1 + k * FORK_STRIDE) % 2**64)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_samples_hold_their_prompt_once_after_a_preemption_too(caching, mode):
    bench = Bench(enable_prefix_caching=caching, num_host_blocks=64, preemption_mode=mode)
    bench.add("n", prompt_of(50), n=4, max_tokens=30)
    for _ in range(8):
        bench.step()
    held = blocks_of_samples(50, [57] * 4, 4)
    assert bench.scheduler.stats().blocks_owned == held
    state = bench.preempt()
    stats = bench.scheduler.stats()
    assert (stats.blocks_owned, stats.host_blocks_used) == (0, held if mode == "swap" else 0)
    while min(seq.num_computed for seq in state.sequences) < 58:
        bench.step()
        ahead = [max(seq.num_computed, 50) for seq in state.sequences]
        assert bench.scheduler.stats().blocks_owned >= blocks_of_samples(50, ahead, 4)
    lengths = [seq.num_computed for seq in state.sequences]
    assert bench.scheduler.stats().blocks_owned == blocks_of_samples(50, lengths, 4)
    assert bench.scheduler.stats().host_blocks_used == 0
    bench.run()
    for k in range(4):
        assert bench.answers["n", k] == expected(prompt_of(50), 30, (1 + k * FORK_STRIDE) % 2**64)


def test_beams_share_blocks_and_give_them_back_as_they_fall():
    bench = Bench()
    params = {"temperature": 0.0, "beam_width": 4, "n": 3, "max_tokens": 20, "ignore_eos": False}
    request = bench.add("beams", prompt_of(50), **params)
    bench.step()
    (state,) = bench.scheduler._requests.running
    assert bench.scheduler.stats().blocks_owned == 13
    while bench.step() is not None and bench.scheduler._requests.running:
        tables = [seq.block_table for seq in state.sequences]
        assert len(tables) == 4
        assert bench.scheduler.stats().blocks_owned == len({block for table in tables for block in table})
        # Where beams are alike up to a block's end, the block is one.
        for one, other in itertools.combinations(state.sequences, 2):
            pairs = zip(one.token_ids[:-1], other.token_ids[:-1], strict=True)
            alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            assert one.block_table[: alike // 4] == other.block_table[: alike // 4]
    assert 0.3 < bench.scheduler.stats().share_saved() < 0.8
    wanted = expected_beams(prompt_of(50), request.params)
    assert [bench.answers["beams", i] for i in range(3)] == [tokens for tokens, _ in wanted]
    assert [bench.scores["beams", i] for i in range(3)] == pytest.approx([score for _, score in wanted])
    assert ("beams", 3) not in bench.answers


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
def test_beams_go_and_come_back_together(mode, caching):
    bench = Bench(enable_prefix_caching=caching, num_host_blocks=64, preemption_mode=mode)
    params = {"temperature": 0.0, "beam_width": 4, "n": 4, "max_tokens": 16}
    request = bench.add("beams", prompt_of(30), **params)
    for _ in range(9):
        bench.step()
    before = bench.scheduler.stats().blocks_owned
    state = bench.preempt()
    bench.step()
    assert len(state.sequences) == 4
    if mode == "swap":  # all that was shared is shared again; a step more has been computed
        assert before <= bench.scheduler.stats().blocks_owned <= before + 4
    bench.run()
    wanted = expected_beams(prompt_of(30), request.params)
    assert [bench.answers["beams", i] for i in range(4)] == [tokens for tokens, _ in wanted]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("steps", range(5, 11))
def test_beams_that_wait_for_each_other_may_be_preempted_then(mode, steps):
    bench = Bench(enable_prefix_caching=False, max_num_batched_tokens=3, num_host_blocks=64, preemption_mode=mode)
    params = {"temperature": 0.0, "beam_width": 4, "n": 4, "max_tokens": 6}
    request = bench.add("beams", prompt_of(9), **params)
    for _ in range(steps):
        bench.step()
    state = bench.preempt()
    for _ in range(3):
        bench.step()
    if state in bench.scheduler._requests.running:
        bench.preempt()
    bench.run()
    wanted = expected_beams(prompt_of(9), request.params)
    assert [bench.answers["beams", i] for i in range(4)] == [tokens for tokens, _ in wanted]


def test_what_is_still_to_be_filled_for_others_is_not_kept():
    bench = Bench(
        enable_prefix_caching=False, max_num_batched_tokens=16, num_host_blocks=64, preemption_mode="recompute"
    )
    bench.add("n", prompt_of(33), n=3, max_tokens=20)
    for _ in range(6):
        bench.step()
    state = bench.preempt()
    bench.scheduler.swap._mode = "swap"
    bench.step()
    assert 0 < state.sequences[0].num_computed < state.sequences[0].fills
    bench.preempt()
    assert bench.scheduler.swap.num_used == 0
    bench.run()
    for k in range(3):
        assert bench.answers["n", k] == expected(prompt_of(33), 20, (1 + k * FORK_STRIDE) % 2**64)


def test_equal_samples_keep_a_token_each_to_compute():
    bench = Bench(enable_prefix_caching=False)
    bench.add("n", prompt_of(7), n=2, max_tokens=20)
    bench.step()
    (state,) = bench.scheduler._requests.running
    for seq in state.sequences:
        seq.token_ids[-1] = 5  # as two greedy samples would; eight tokens fill two blocks
    assert state.num_common == 7
    bench.preempt()
    bench.run()
    assert [len(bench.answers["n", k]) for k in range(2)] == [20, 20]


def test_an_aborted_search_and_an_aborted_sample_in_host_memory_leave_nothing():
    bench = Bench(num_host_blocks=64, preemption_mode="swap")
    for name, params in (("beams", {"temperature": 0.0, "beam_width": 4}), ("n", {"n": 3})):
        bench.add(name, prompt_of(30), max_tokens=20, **params)
        for _ in range(5):
            bench.step()
        bench.preempt()
        bench.scheduler.abort(name, 1)
        bench.scheduler.check()
        if name == "beams":  # no answer exists that could be ended
            assert len(bench.scheduler._requests.waiting[0].sequences) == 4
            bench.scheduler.abort(name)
            bench.scheduler.check()
            assert not bench.scheduler.has_work()
    bench.run()
    for k in (0, 2):
        assert bench.answers["n", k] == expected(prompt_of(30), 20, (1 + k * FORK_STRIDE) % 2**64)


def test_auto_takes_the_cheaper_kind_of_preemption():
    config = engine_config(num_host_blocks=8)
    bench = Bench()
    bench.add("a", prompt_of(30), max_tokens=20)
    bench.step()
    (state,) = bench.scheduler._requests.running
    for per_token, kept in ((1.0, True), (1e-9, False)):
        swap = SwapSpace(config.num_host_blocks, "auto", SwapCost(per_block=0.001, per_token=per_token))
        assert swap.suits(state.sequences, bench.scheduler.blocks) is kept
    few = SwapSpace(7, "swap", SwapCost(0.0, 1.0))
    assert not few.suits(state.sequences, bench.scheduler.blocks)


def test_host_memory_is_made_when_enough_have_gone_without_it():
    bench = Bench(num_host_blocks=20, preemption_mode="auto")
    # 32 tokens in 8 blocks: 24 s are saved, but 60 are to be spent first.
    bench.scheduler.swap._cost = SwapCost(per_block=1.0, per_token=1.0, per_new_block=7.5)
    bench.add("a", prompt_of(32), max_tokens=20)
    swaps = []
    for _ in range(6):
        bench.step()
        bench.preempt()
        swaps.append(bench.scheduler.stats().swaps)
    assert swaps == [0, 0, 1, 2, 3, 4]  # the memory is there, and for a tenth block enough was saved
    assert bench.scheduler.swap._forgone == 24 + 24 + 25 + 27 - 7.5 * 10  # what was made is paid for
    bench.run()
    assert bench.answers["a", 0] == expected(prompt_of(32), 20, 1)


def test_preemption_changes_no_answer_and_is_counted():
    bench = Bench(eager=True, num_blocks=30, max_model_len=100)
    prompts = {f"r{i}": prompt_of(9 + i, seed=i) for i in range(8)}
    for name, prompt in prompts.items():
        bench.add(name, prompt, max_tokens=40)
    bench.run()
    stats = bench.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.wasted_tokens > 0
    for name, prompt in prompts.items():
        assert bench.answers[name, 0] == expected(prompt, 40, 1)


def test_admission_looks_ahead_and_shared_blocks_count_once():
    lost = {}
    for eager in (True, False):
        bench = Bench(eager=eager, num_blocks=100, max_num_seqs=64)
        for i in range(40):
            bench.add(f"r{i}", prompt_of(9 + i % 7, seed=i), max_tokens=60)
        bench.run()
        lost[eager] = bench.scheduler.stats().wasted_tokens
    assert lost[False] < lost[True] / 2
    bench = Bench(num_blocks=64, max_num_seqs=64)
    bench.add("first", prompt_of(160), max_tokens=4)
    bench.step()
    for i in range(12):
        bench.add(f"r{i}", [*prompt_of(160), i], max_tokens=4)
    for _ in range(3):
        bench.step()
    # Each prompt fills 41 of the 64 blocks; counted alone, one request would run at a time.
    assert bench.scheduler.stats().running >= 8
    bench.run()


def test_preempted_samples_share_their_prompt_again():
    bench = Bench(eager=True, num_blocks=28, max_model_len=80, max_num_batched_tokens=16)
    bench.add("n", prompt_of(33), n=3, max_tokens=20, priority=1)
    for _ in range(6):
        bench.step()
    bench.add("urgent", prompt_of(30, 5), max_tokens=40)
    bench.run()
    assert bench.scheduler.stats().preemptions > 0
    for k in range(3):
        assert bench.answers["n", k] == expected(prompt_of(33), 20, (1 + k * FORK_STRIDE) % 2**64)
    assert bench.answers["urgent", 0] == expected(prompt_of(30, 5), 40, 1)


def test_a_leader_that_goes_while_it_fills_shared_blocks_leaves_none_of_them_empty():
    bench = Bench(eager=True, num_blocks=28, max_model_len=80, max_num_batched_tokens=16, enable_prefix_caching=False)
    bench.add("n", prompt_of(33), n=3, max_tokens=20)
    for _ in range(6):
        bench.step()
    state = bench.scheduler._requests.running[0]
    bench.scheduler._preempt(state, None)
    bench.oracle.cache[:] = -1  # what the blocks held before must not stand in for what is to be computed
    bench.step()
    leader = state.sequences[0]
    assert 0 < leader.num_computed < leader.fills
    bench.scheduler.abort("n", leader.index)
    bench.run()
    for k in (1, 2):
        assert bench.answers["n", k] == expected(prompt_of(33), 20, (1 + k * FORK_STRIDE) % 2**64)


def test_the_victim_is_the_least_important_and_the_cheapest():
    bench = Bench(eager=True, num_blocks=24, max_model_len=90)
    bench.add("important", prompt_of(10, 1), max_tokens=60, priority=-1)
    bench.add("dear", prompt_of(40, 2), max_tokens=30)
    bench.add("cheap", prompt_of(12, 3), max_tokens=30)
    while bench.scheduler.stats().preemptions == 0:
        bench.step()
    assert [state.request.request_id for state in bench.scheduler._requests.waiting] == ["cheap"]
    bench.run()
    assert bench.answers["cheap", 0] == expected(prompt_of(12, 3), 30, 1)
