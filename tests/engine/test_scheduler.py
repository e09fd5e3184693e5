"""The scheduler against the paged oracle: every policy must leave every answer as it is."""

import itertools
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_oracle import EOS, PagedOracle, engine_config, expected, expected_beams

from octavo.engine.rows import FORK_STRIDE
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import Plan
from octavo.engine.swap import SwapCost, SwapSpace
from octavo.errors import RequestError
from octavo.request import Request
from octavo.sampling_params import SamplingParams


class Bench:
    """A scheduler and an oracle, stepped by hand, with every invariant checked after every step.

    `depth` steps are scheduled before the first one's result is looked at.
    """

    def __init__(self, *, eager=False, depth=1, **changes):
        self.depth = depth
        self.config = engine_config(**changes)
        self.scheduler = Scheduler(self.config)
        if eager:  # admit whatever fits this moment, so that preemption is certain
            self.scheduler._fits_ahead = lambda state, owned_hits: True
        self.oracle = PagedOracle(self.config.num_blocks, self.config.block_size, self.config.num_host_blocks)
        self.answers = defaultdict(list)
        self.reasons = {}
        self.prompt_logprobs = defaultdict(dict)
        self.cached = {}
        self.scores = {}

    def add(self, name, prompt, *, priority=0, salt=None, bad_words=(), **params):
        params = {"max_tokens": 8, "ignore_eos": True, "seed": 1} | params
        request = Request(name, list(prompt), SamplingParams(**params), priority, salt, [list(w) for w in bad_words])
        self.scheduler.add(request)
        return request

    def step(self):
        while self.scheduler.steps_under_way < self.depth and (batch := self.scheduler.schedule()):
            assert batch.num_tokens <= self.config.max_num_batched_tokens
            assert batch.num_rows <= self.config.max_num_seqs
            self.scheduler.check()
            self.oracle.submit(batch)
        if not self.scheduler.steps_under_way:
            return None
        batch = self.oracle.batches[-1]
        output = self.scheduler.update(self.oracle.result())
        self.scheduler.check()
        self.poison()
        for name, index, _, score in output.beam_scores:
            self.scores[name, index] = score
        for name, index, token, reason, stop, _ in output.tokens:
            self.answers[name, index].append(token)
            if reason:
                self.reasons[name, index] = (reason, stop)
        for name, start, entries in output.prompt_logprobs:
            for i, entry in enumerate(entries):
                self.prompt_logprobs[name][start + i] = entry
        for name, _, cached in output.started:
            self.cached[name] = cached
        return batch

    def preempt(self):
        """Preempts the only running request, its copies made at once."""
        (state,) = self.scheduler._running
        plan = Plan(budget=0)
        self.scheduler._preempt(state, plan)
        self.oracle.swap(plan.swap_out, [])
        self.poison()
        self.scheduler.check()
        return state

    def poison(self):
        """Nobody may rely on what lies in a block that is free."""
        blocks, swap = self.scheduler.blocks, self.scheduler.swap
        free = [block for block in blocks._free_queue if blocks._hash_of[block] is None]
        self.oracle.poison(free, swap._free)

    def run(self, limit=10_000):
        for _ in range(limit):
            if self.step() is None:
                assert not self.scheduler.has_work()
                assert self.scheduler.blocks.num_owned == self.scheduler.swap.num_used == 0
                return self
        raise AssertionError("the scheduler does not come to an end")


def prompt_of(length, seed=0):
    return [random.Random(seed).randrange(10, 1000) for _ in range(length)]


def test_one_request_alone():
    bench = Bench()
    bench.add("a", prompt_of(10))
    bench.run()
    assert bench.answers["a", 0] == expected(prompt_of(10), 8, 1)
    assert bench.reasons["a", 0] == ("length", None)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("budget", [16, 17, 100])
@pytest.mark.parametrize("caching", [True, False])
def test_answers_do_not_depend_on_blocks_chunks_company_or_cache(block_size, budget, caching):
    bench = Bench(
        block_size=block_size,
        num_blocks=1024 // block_size,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    prompts = {f"r{i}": prompt_of(1 + 7 * i, seed=i % 3) for i in range(10)}
    for name, prompt in prompts.items():
        bench.add(name, prompt)
    bench.run()
    for name, prompt in prompts.items():
        assert bench.answers[name, 0] == expected(prompt, 8, 1)


def test_a_long_prompt_goes_in_chunks_and_never_stops_the_streams():
    bench = Bench(max_num_batched_tokens=20, max_num_seqs=4)
    for i in range(3):
        bench.add(f"stream{i}", prompt_of(4, i), max_tokens=30)
    bench.step()
    bench.add("long", prompt_of(150, 9), max_tokens=2)
    while not bench.answers["long", 0]:
        batch = bench.step()
        assert batch.num_rows == 4
        assert sorted(batch.query_start[1:] - batch.query_start[:-1])[:3] == [1, 1, 1]
    bench.run()
    assert bench.answers["long", 0] == expected(prompt_of(150, 9), 2, 1)


def test_equal_beginnings_share_blocks():
    bench = Bench()
    prompt = prompt_of(41)
    bench.add("first", prompt)
    bench.run()
    bench.add("second", prompt)
    bench.add("third", [*prompt[:20], 1, 2, 3])
    bench.step()
    assert bench.cached == {"first": 0, "second": 40, "third": 20}
    assert bench.scheduler.stats().blocks_owned < 2 * 11
    bench.run()
    assert bench.answers["second", 0] == bench.answers["first", 0]


def test_one_token_is_always_computed():
    bench = Bench()
    bench.add("first", prompt_of(40))
    bench.run()
    bench.add("again", prompt_of(40))
    bench.run()
    assert bench.cached["again"] == 36
    assert bench.answers["again", 0] == bench.answers["first", 0]


def test_a_salt_keeps_caches_apart():
    bench = Bench()
    bench.add("mine", prompt_of(40), salt="me")
    bench.run()
    bench.add("yours", prompt_of(40), salt="you")
    bench.add("mine again", prompt_of(40), salt="me")
    bench.run()
    assert bench.cached["yours"] == 0
    assert bench.cached["mine again"] == 36


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
    (state,) = bench.scheduler._running
    assert bench.scheduler.stats().blocks_owned == 13
    while bench.step() is not None and bench.scheduler._running:
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
    if state in bench.scheduler._running:
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
    (state,) = bench.scheduler._running
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
            assert len(bench.scheduler._waiting[0].sequences) == 4
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
    (state,) = bench.scheduler._running
    for per_token, kept in ((1.0, True), (1e-9, False)):
        swap = SwapSpace(config.num_host_blocks, "auto", SwapCost(per_block=0.001, per_token=per_token))
        assert swap.suits(state.sequences, bench.scheduler.blocks) is kept
    few = SwapSpace(7, "swap", SwapCost(0.0, 1.0))
    assert not few.suits(state.sequences, bench.scheduler.blocks)


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
    state = bench.scheduler._running[0]
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
    assert [state.request.request_id for state in bench.scheduler._waiting] == ["cheap"]
    bench.run()
    assert bench.answers["cheap", 0] == expected(prompt_of(12, 3), 30, 1)


def test_priority_then_arrival():
    bench = Bench(max_num_seqs=1)
    for name, priority in [("late", 1), ("first", 0), ("second", 0), ("now", -1)]:
        bench.add(name, prompt_of(5), priority=priority, max_tokens=1)
    bench.run()
    assert [name for name, _ in bench.answers] == ["now", "first", "second", "late"]


@pytest.mark.parametrize("depth", [1, 2])
def test_stops(depth):
    bench = Bench(depth=depth)
    answer = expected(prompt_of(10), 64, 1)
    bench.add("token", prompt_of(10), stop_token_ids=[answer[5]], max_tokens=64)
    bench.add("late", prompt_of(10), stop_token_ids=[answer[5]], min_tokens=6, max_tokens=64)
    bench.run()
    assert bench.reasons["token", 0] == ("stop", answer[5])
    assert len(bench.answers["token", 0]) == answer.index(answer[5]) + 1
    assert len(bench.answers["late", 0]) >= 6


def test_a_step_is_scheduled_before_the_last_one_is_seen():
    bench = Bench(depth=2)
    bench.add("plain", prompt_of(5), max_tokens=4)
    bench.add("bound", prompt_of(6), max_tokens=4, presence_penalty=0.5)
    bench.run()
    first, second = bench.oracle.batches[:2]
    assert first.num_rows == 2
    assert second.token_ids.tolist() == [~0], "the token is the device's to look up, and who depends on it waits"
    assert bench.answers["plain", 0] == expected(prompt_of(5), 4, 1)
    assert bench.answers["bound", 0] == expected(prompt_of(6), 4, 1)
    assert sum(batch.num_rows for batch in bench.oracle.batches) == 8, "nothing is computed in vain at a known end"


def test_what_a_stop_token_makes_useless_is_dropped():
    answer = expected(prompt_of(10), 16, 1)
    bench = Bench(depth=2)
    bench.add("a", prompt_of(10), stop_token_ids=[answer[3]], max_tokens=16)
    bench.run()
    assert bench.answers["a", 0] == answer[: answer.index(answer[3]) + 1]
    assert len(bench.oracle.batches) == len(bench.answers["a", 0]) + 1


def test_equal_prompts_that_come_together_are_computed_once():
    bench = Bench(block_size=4)
    for name in "abc":
        bench.add(name, prompt_of(22), max_tokens=2)
    assert bench.step().num_tokens == 22 + 2 + 2
    bench.run()
    assert all(bench.answers[name, 0] == expected(prompt_of(22), 2, 1) for name in "abc")


def test_eos_ends_and_min_tokens_forbids_it():
    bench = Bench()
    bench.add("a", prompt_of(10), min_tokens=2, stop_token_ids=[11], max_tokens=4, ignore_eos=False)
    first = bench.step()
    assert set(zip(first.sampling.bias_token.tolist(), first.sampling.bias_value.tolist(), strict=True)) == {
        (EOS, float("-inf")),
        (11, float("-inf")),
    }
    bench.step()
    assert len(bench.step().sampling.bias_token) == 0


def test_bad_words_forbid_the_token_that_would_complete_them():
    answer = expected(prompt_of(10), 8, 1)
    bench = Bench()
    bench.add("a", prompt_of(10), bad_words=[[answer[2], 500], [501]])
    forbidden = [bench.step().sampling.bias_token.tolist() for _ in range(4)]
    assert forbidden == [[501], [501], [501], [500, 501]]


def test_abort_frees_at_once():
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, prompt_of(20, seed=ord(name)), max_tokens=50)
    bench.step()
    bench.scheduler.abort("a")
    bench.scheduler.abort("c")
    bench.scheduler.abort("nobody")
    bench.scheduler.check()
    bench.run()
    assert len(bench.answers["a", 0]) == 1
    assert ("c", 0) not in bench.answers
    assert bench.answers["b", 0] == expected(prompt_of(20, seed=ord("b")), 50, 1)


def test_prompt_logprobs_come_for_every_position_whatever_the_chunks():
    bench = Bench(max_num_batched_tokens=16)
    prompt = prompt_of(50)
    bench.add("warm", prompt)
    bench.run()
    bench.add("a", prompt, prompt_logprobs=0)
    bench.run()
    assert [bench.prompt_logprobs["a"][i][0] for i in range(49)] == [[token] for token in prompt[1:]]
    assert bench.cached["a"] == 0


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "prompt is empty"),
        (prompt_of(256), {}, "256 tokens"),
        (prompt_of(200), {"max_tokens": 57}, "max_tokens to 56 or less"),
        ([1000], {}, "token id 1000"),
        ([1], {"n": 17}, "n is 17"),
        (prompt_of(50), {"n": 8, "max_tokens": 100}, "KV blocks"),
        ([1], {"beam_width": 20, "temperature": 0.0}, "beam_width is 20, but at most 16 sequences"),
        (prompt_of(50), {"beam_width": 8, "temperature": 0.0, "max_tokens": 100}, "8 beams of up to 150 tokens need"),
        (
            [1],
            {"beam_width": 8, "temperature": 0.0, "stop_token_ids": list(range(495))},
            "beam_width is 8, too wide.* set it to 5 or less",
        ),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids"),
        ([1], {"logit_bias": {5000: 1.0}}, "logit_bias"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(prompt, params, words):
    with pytest.raises(RequestError, match=words):
        Bench().add("a", prompt, **params)


def test_the_advice_of_a_refusal_works():
    bench = Bench(num_blocks=64)
    with pytest.raises(RequestError) as refused:
        bench.add("a", prompt_of(50), n=8, max_tokens=100)
    advice = int(str(refused.value).split("max_tokens to ")[1].split()[0])
    bench.add("a", prompt_of(50), n=8, max_tokens=advice)
    bench.run()
    with pytest.raises(RequestError):
        bench.add("b", prompt_of(50), n=8, max_tokens=advice + 4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_traffic_ends_with_the_right_answers(data):
    block_size = data.draw(st.sampled_from([1, 2, 4, 8]))
    bench = Bench(
        eager=data.draw(st.booleans()),
        depth=data.draw(st.sampled_from([1, 2])),
        block_size=block_size,
        num_blocks=data.draw(st.integers(64 // block_size, 160 // block_size)),
        max_model_len=64,
        max_num_seqs=data.draw(st.integers(3, 8)),
        max_num_batched_tokens=data.draw(st.integers(8, 70)),
        enable_prefix_caching=data.draw(st.booleans()),
        num_host_blocks=data.draw(st.sampled_from([0, 5, 200])),
        preemption_mode=data.draw(st.sampled_from(["auto", "swap", "recompute"])),
    )
    bench.scheduler.swap._cost = SwapCost(per_block=1.0, per_token=data.draw(st.sampled_from([0.1, 1.0, 10.0])))
    wanted = {}
    for i in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(0, 5))):
            bench.step()
        prompt = prompt_of(data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 2)))
        n, max_tokens = data.draw(st.sampled_from([1, 1, 1, 2, 3])), data.draw(st.integers(1, 24))
        params = {"n": n, "max_tokens": max_tokens, "seed": i, "priority": data.draw(st.integers(0, 1))}
        beams = data.draw(st.integers(0, 3)) == 0
        if beams:
            params |= {"temperature": 0.0, "beam_width": max(2, n), "ignore_eos": data.draw(st.booleans())}
        try:
            request = bench.add(f"r{i}", prompt, **params)
        except RequestError:
            continue
        answers = [tokens for tokens, _ in expected_beams(prompt, request.params)] if beams else None
        for k in range(n):
            seed = (i + k * FORK_STRIDE) % 2**64
            wanted[f"r{i}", k] = answers[k] if answers else expected(prompt, max_tokens, seed)
        if data.draw(st.integers(0, 9)) == 0:
            abort_some(bench, f"r{i}", n, data, wanted, beams)
    bench.run()
    assert {key: answer for key, answer in bench.answers.items() if answer} == {
        key: answer for key, answer in wanted.items() if answer
    }


def abort_some(bench, name, n, data, wanted, beams):
    """Aborts a request or one of its samples, after some steps; `wanted` then holds what had come by then."""
    index = None if data.draw(st.booleans()) else data.draw(st.integers(0, n - 1))
    for _ in range(data.draw(st.integers(0, 20))):
        bench.step()
    bench.scheduler.abort(name, index)
    bench.scheduler.check()
    # A sample that does not exist yet, or a search's answer, cannot be ended alone.
    nothing = index is not None and (beams or (n > 1 and (name, 0) not in bench.answers))
    for k in range(n) if index is None else [index]:
        if bench.reasons.get((name, k)) is None and not nothing:
            wanted[name, k] = wanted[name, k][: len(bench.answers[name, k])]
