"""Fair share between tenants: the counters, the order, who gives way; and that no answer changes by it."""

import random

import pytest
from paged_oracle import expected
from scheduler_bench import Bench, prompt_of

from octavo.cli.bench.fairness import compare
from octavo.engine.block_manager import BlockManager
from octavo.engine.fair_share import FairShare
from octavo.request import Request
from octavo.sampling_params import SamplingParams


def add(bench, name, tenant, *, prompt=10, priority=0, **params):
    given = {"max_tokens": 8, "ignore_eos": True, "seed": 1} | params
    tokens = prompt_of(prompt, seed=hash(name) % 1000) if isinstance(prompt, int) else prompt
    bench.scheduler.add(Request(name, tokens, SamplingParams(**given), priority, tenant=tenant))
    return tokens


def running(bench):
    return {state.request.request_id for state in bench.scheduler._requests.running}


def test_whoever_comes_back_begins_where_the_others_are():
    fair = FairShare(8, BlockManager(8, 4))
    fair.arrives("busy")
    fair.serve("busy", 100)
    fair.arrives("new")
    assert fair.served("new") == 100
    fair.serve("new", 50)
    fair.leaves("new")
    fair.serve("busy", 10)
    fair.arrives("new")
    assert fair.served("new") == 150, "what it was served before is not forgiven"
    fair.leaves("new")
    fair.leaves("busy")
    fair.arrives("third")
    assert fair.served("third") == 110, "an empty queue forgets nobody's lead"
    fair.serve("gone", 5)  # its last request has ended with that token


def test_counters_of_tenants_that_left_do_not_pile_up():
    fair = FairShare(8, BlockManager(8, 4))
    for i in range(5000):
        fair.arrives(f"t{i}")
        fair.serve(f"t{i}", 1)
        fair.leaves(f"t{i}")
    assert len(fair._served) < 1100


def test_tenants_take_turns_by_what_they_were_served():
    bench = Bench(fair_share=True, max_num_seqs=1)
    for i in range(3):
        add(bench, f"a{i}", "a", prompt=40)
    for i in range(6):
        add(bench, f"b{i}", "b", prompt=10)
    bench.run()
    order = [name for name, _ in bench.reasons]
    # a's requests cost 40 + 2 * 8, b's 10 + 2 * 8: about two of b's for each of a's.
    assert order == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "a2", "b5"]


def test_a_higher_priority_goes_first_whoever_asks():
    bench = Bench(fair_share=True, max_num_seqs=1)
    add(bench, "a0", "a")
    bench.step()
    add(bench, "a1", "a", priority=-1)
    add(bench, "b0", "b")
    bench.run()
    assert [name for name, _ in bench.reasons] == ["a0", "a1", "b0"]


def test_who_holds_most_gives_way_until_shares_are_even():
    bench = Bench(fair_share=True, max_num_seqs=4)
    for i in range(8):
        add(bench, f"a{i}", "a", max_tokens=30)
    bench.step()
    assert running(bench) == {"a0", "a1", "a2", "a3"}
    for i in range(3):
        add(bench, f"b{i}", "b", max_tokens=30)
    bench.step()
    assert len(running(bench) & {"b0", "b1", "b2"}) == 1, "at once, since b was served least"
    for _ in range(8):  # and again when a has been served more by b0's prompt
        bench.step()
    assert len(running(bench) & {"b0", "b1", "b2"}) == 2, "two of four rows each, and not three"
    assert bench.scheduler.stats().preemptions == 2
    for _ in range(10):
        bench.step()
    assert bench.scheduler.stats().preemptions == 2, "nobody takes back what is even"
    bench.run()


def test_a_more_important_request_never_gives_way():
    bench = Bench(fair_share=True, max_num_seqs=2)
    for i in range(2):
        add(bench, f"a{i}", "a", priority=-1, max_tokens=20)
    bench.step()
    add(bench, "b", "b")
    bench.step()
    assert running(bench) == {"a0", "a1"}
    bench.run()


def test_the_prompt_of_whom_was_served_least_is_computed_first():
    bench = Bench(fair_share=True, max_num_batched_tokens=20)
    add(bench, "long", "a", prompt=150)
    bench.step()
    add(bench, "short", "b", prompt=18)
    bench.step()
    assert bench.answers["short", 0]
    bench.run()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("seed", range(6))
def test_no_answer_changes(seed, mode):
    """Random tenants over a small cache, with samples and beams between; every invariant after every step."""
    rng = random.Random(seed)
    hosts = 40 if mode == "swap" else 0
    bench = Bench(
        eager=seed % 2 == 0, fair_share=True, num_blocks=48, max_num_seqs=6, num_host_blocks=hosts, preemption_mode=mode
    )
    prompts = {}
    for i in range(40):
        n = rng.choice((1, 1, 1, 3))
        how = {"beam_width": 3, "temperature": 0.0, "seed": None} if rng.random() < 0.15 else {"n": n}
        name = f"r{i}"
        common = prompt_of(12, seed=rng.randrange(3))
        tokens = common + prompt_of(rng.randrange(1, 20), seed=i)
        add(bench, name, rng.choice("aaab"), prompt=tokens, max_tokens=rng.randrange(1, 25), **how)
        prompts[name] = (tokens, how)
        for _ in range(rng.randrange(3)):
            bench.step()
    bench.run()
    assert bench.scheduler.stats().preemptions > 0
    for name, (tokens, how) in prompts.items():
        if "n" in how:
            answer = bench.answers[name, 0]
            assert answer == expected(tokens, len(answer), 1)


def test_a_flood_does_not_double_anothers_wait():
    alone, unfair, fair = compare("sharegpt", 40, 300, 1.0, max_num_seqs=256, max_num_batched_tokens=512)
    assert unfair["times_alone"] > 20
    assert fair["times_alone"] <= 2
    assert fair["seconds"] < 1.1 * unfair["seconds"], "and costs little of the whole"
    assert alone["preemptions"] == 0
