"""The scheduler against the paged oracle: every policy must leave every answer as it is."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_oracle import EOS, expected, expected_beams
from scheduler_bench import Bench, prompt_of

from octavo.batch import NextStep
from octavo.engine.rows import FORK_STRIDE
from octavo.engine.swap import SwapCost
from octavo.errors import RequestError


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
    bench.add("bound", prompt_of(6), max_tokens=4, bad_words=[[3, 4]])
    bench.run()
    first, second = bench.oracle.batches[:2]
    assert first.num_rows == 2
    assert second.token_ids.tolist() == [~0], "the token is the device's to look up, and who depends on it waits"
    assert bench.answers["plain", 0] == expected(prompt_of(5), 4, 1)
    assert bench.answers["bound", 0] == expected(prompt_of(6), 4, 1)
    assert sum(batch.num_rows for batch in bench.oracle.batches) == 8, "nothing is computed in vain at a known end"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_penalties_are_for_all_tokens_before(depth):
    """Also for the one that only a device knows, which is always one that the step before draws."""
    bench = Bench(depth=depth, num_blocks=20, eager=True)
    bench.add("plain", prompt_of(20), max_tokens=30)
    bench.add("a", [5, 6, 5, 7], max_tokens=25, presence_penalty=0.5)
    bench.add("b", [8, 9], max_tokens=25, repetition_penalty=1.1, n=2)
    bench.run()
    tokens = {"a": [bench.answers["a", 0]], "b": [bench.answers["b", 0], bench.answers["b", 1]]}
    pending = 0
    for before, batch in zip([None, *bench.oracle.batches], bench.oracle.batches, strict=False):
        columns = batch.sampling
        for i, sample in enumerate(columns.penalty_sample.tolist()):
            part = slice(*columns.penalty_start[i : i + 2])
            found = dict(zip(columns.penalty_token[part].tolist(), columns.penalty_count[part].tolist(), strict=True))
            assert len(found) == part.stop - part.start, "each token once"
            drawn = int(columns.counter[sample])
            name, prompt = ("a", [5, 6, 5, 7]) if columns.presence_penalty[i] else ("b", [8, 9])
            known = drawn
            if columns.penalty_pending[i] < 0:
                pending += 1
                known -= 1
                earlier = before.sampling
                assert ~columns.penalty_pending[i] in earlier.penalty_sample
                assert earlier.counter[~columns.penalty_pending[i]] == drawn - 1
            assert found in [
                {token: answer[:known].count(token) for token in prompt + answer[:known]} for answer in tokens[name]
            ]
    assert (pending > 0) == (depth > 1)
    assert bench.scheduler.stats().preemptions > 0


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
        depth=data.draw(st.sampled_from([1, 2, 3])),
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
        stops = data.draw(st.sampled_from([(), tuple(range(0, 1000, 11))]))
        if data.draw(st.integers(0, 4)) == 0:
            params |= {"logit_bias": {500: 0.0}}  # says nothing, but takes the slow path
        if not beams:
            params |= {"stop_token_ids": list(stops), "ignore_eos": data.draw(st.booleans())}
        if beams:
            params |= {"temperature": 0.0, "beam_width": max(2, n), "ignore_eos": data.draw(st.booleans())}
        try:
            request = bench.add(f"r{i}", prompt, **params)
        except RequestError:
            continue
        answers = [tokens for tokens, _ in expected_beams(prompt, request.params)] if beams else None
        for k in range(n):
            seed = (i + k * FORK_STRIDE) % 2**64
            wanted[f"r{i}", k] = answers[k] if answers else until_stop(expected(prompt, max_tokens, seed), params)
        if data.draw(st.integers(0, 9)) == 0:
            abort_some(bench, f"r{i}", n, data, wanted, beams)
    bench.run()
    assert {key: answer for key, answer in bench.answers.items() if answer} == {
        key: answer for key, answer in wanted.items() if answer
    }


def until_stop(answer, params):
    """`answer` up to the first token that ends it."""
    ends = {*params["stop_token_ids"], *([] if params["ignore_eos"] else [EOS])}
    return answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer)) + 1]


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


def test_a_next_step_is_rows_and_blocks_alone():
    """It crosses to other processes, where it must be smaller than the Batch that it stands for."""
    bench = Bench(max_num_seqs=64, num_blocks=600, max_num_batched_tokens=600)
    for i in range(64):
        bench.add(f"r{i}", range(3, 11), max_tokens=30)
    steps = []
    schedule = bench.scheduler.schedule
    bench.scheduler.schedule = lambda: steps.append(schedule()) or steps[-1]
    while bench.scheduler.has_work():
        bench.step()
    followers = [step for step in steps if isinstance(step, NextStep)]
    assert len(followers) > 20
    for step in followers:
        assert len(pickle.dumps(step)) < 1500
        again = pickle.loads(pickle.dumps(step))
        assert (again.rows == step.rows).all()
        assert (again.blocks == step.blocks).all()
