"""Who only decodes goes forward in columns, and comes out of them as if it had never been there."""

import random

import pytest
from paged_oracle import expected
from scheduler_bench import Bench, prompt_of

from octavo.engine import decoding
from octavo.engine.rows import FORK_STRIDE


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_more_steps_than_are_kept_before_they_are_written_down(depth):
    bench = Bench(depth=depth, max_model_len=1024, num_blocks=2048, block_size=4)
    for i in range(3):
        bench.add(f"r{i}", prompt_of(5 + i, seed=i), max_tokens=600 + i)
    for _ in range(300):
        bench.step()
    bench.scheduler.abort("r0")
    bench.add("late", prompt_of(9), max_tokens=300)
    bench.run()
    assert bench.continued > 500
    for i in (1, 2):
        assert bench.answers[f"r{i}", 0] == expected(prompt_of(5 + i, seed=i), 600 + i, 1)
    assert bench.answers["late", 0] == expected(prompt_of(9), 300, 1)
    got = bench.answers["r0", 0]
    assert got == expected(prompt_of(5), 600, 1)[: len(got)]
    assert 290 < len(got) <= 300


def test_only_who_does_nothing_else_is_there():
    bench = Bench(depth=2)
    bench.add("plain", prompt_of(5), max_tokens=40)
    bench.add("samples", prompt_of(6), max_tokens=40, n=3)
    bench.add("biased", prompt_of(7), max_tokens=40, logit_bias={3: 1.0})
    bench.add("logprobs", prompt_of(8), max_tokens=40, logprobs=1)
    for _ in range(12):
        bench.step()
    columns = bench.scheduler._requests.decoding
    assert len(columns) == 4
    bench.scheduler.abort("samples", 1)
    assert len(columns) == 1, "a request's samples come and go together"
    for _ in range(4):
        bench.step()
    assert len(columns) == 3
    bench.run()
    assert len(columns) == 0


def test_what_has_been_drawn_is_found_in_the_prefix_cache_by_the_next_turn():
    bench = Bench(depth=2, block_size=4)
    bench.add("first", prompt_of(10), max_tokens=30)
    bench.run()
    bench.add("second", prompt_of(10) + bench.answers["first", 0] + [3], max_tokens=4)
    bench.run()
    assert bench.cached["second"] >= 36


def test_slots_are_counted_where_they_are():
    bench = Bench(block_size=8)
    bench.add("a", prompt_of(8), max_tokens=20)
    empty = []
    for _ in range(10):
        bench.step()
        empty.append(bench.scheduler.stats().empty_slots)
    # 8 tokens fill a block; each step after it fills a slot of the next one.
    assert empty == [0, 7, 6, 5, 4, 3, 2, 1, 0, 7]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_comings_and_goings(monkeypatch, depth, block_size):
    monkeypatch.setattr(decoding, "_LOG_STEPS", 5)
    rng, continued, preempted = random.Random(depth * block_size), 0, 0
    for _ in range(15):
        bench = Bench(
            eager=True,
            depth=depth,
            block_size=block_size,
            num_blocks=max(6, rng.randint(64, 100) // block_size),  # enough for each alone
            max_model_len=48,
            max_num_seqs=rng.randint(3, 8),
            max_num_batched_tokens=rng.choice([8, 70]),
            enable_prefix_caching=rng.random() < 0.5,
            num_host_blocks=rng.choice([0, 200]),
            preemption_mode="swap",
        )
        wanted = {}
        for i in range(10):
            for _ in range(rng.choice([0, 0, 1, 3, 8])):
                bench.step()
            given, n = rng.randint(1, rng.choice([3, 24])), rng.choice([1, 1, 3])
            prompt, max_tokens = prompt_of(given, seed=rng.randint(0, 2)), rng.randint(1, 48 - given if n == 1 else 8)
            answers = [expected(prompt, max_tokens, (i + k * FORK_STRIDE) % 2**64) for k in range(n)]
            stops = [rng.randrange(1000), rng.choice([1, answers[-1][-1]])]
            bench.add(f"r{i}", prompt, n=n, max_tokens=max_tokens, seed=i, stop_token_ids=stops)
            for k, answer in enumerate(answers):
                ends = [answer.index(token) + 1 for token in stops if token in answer]
                wanted[f"r{i}", k] = answer[: min(ends, default=max_tokens)]
            name, k = f"r{rng.randint(0, i)}", rng.randint(0, 2)
            if rng.random() < 0.2 and (name, k) in bench.answers:
                bench.scheduler.abort(name, k)
                wanted[name, k] = bench.answers[name, k][:]
        bench.run()
        assert bench.answers == wanted
        continued += bench.continued
        preempted += bench.scheduler.stats().preemptions
    assert continued > 100
    assert preempted > 5
