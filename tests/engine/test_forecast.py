"""What answers were like decides how far admission looks ahead, and what a request must do decides more."""

import numpy as np
import pytest
from scheduler_bench import Bench, prompt_of

from octavo.engine.forecast import SHARE_OF_MEAN, Forecast, peak


def after(*answers):
    forecast = Forecast(16, 30)
    for _ in range(200):
        for length, at_limit in answers:
            forecast.ended(length, at_limit)
    return forecast


def test_the_share_of_the_mean_is_learned():
    assert after((400, False)).growth == pytest.approx(SHARE_OF_MEAN * 400, rel=0.01)
    assert after((400, True)).growth == pytest.approx(400, rel=0.01)
    half = after((400, True), (400, False)).growth
    assert half == pytest.approx((SHARE_OF_MEAN + 1) / 2 * 400, rel=0.05)


def test_answers_of_few_tokens_that_reach_their_limit_say_nothing_of_long_ones():
    alone = after((1, False), (999, False)).growth
    assert after((1, True), (999, False)).growth == pytest.approx(alone, rel=0.01)


def test_before_an_answer_has_ended_they_are_expected_to_end_by_themselves():
    forecast = Forecast(16, 30)
    assert forecast.growth == SHARE_OF_MEAN * 256


def test_the_peak_is_just_before_somebody_ends():
    # Remainders 100, 100, 50: the first two hold 10 + 30 + 2 * 100 tokens then, all three 60 + 3 * 50 before.
    assert peak(np.array([10, 20, 30]), np.array([100.0, 50.0, 100.0])) == 240
    assert peak(np.array([10, 80, 30]), np.array([100.0, 50.0, 100.0])) == 270


def test_a_request_that_will_have_to_give_way_pays_while_few_rows_share_a_step():
    forecast = after((100, True))
    assert forecast.pays_anyway(190, 10)  # a token costs a tenth of 30 less a token, until 100 are drawn
    assert not forecast.pays_anyway(210, 10)
    assert not forecast.pays_anyway(1, 30)


@pytest.mark.parametrize(
    ("params", "must"),
    [
        ({"ignore_eos": True}, 30),
        ({"ignore_eos": True, "max_tokens": None}, 246),
        ({"ignore_eos": True, "stop_token_ids": [3]}, 0),
        ({"ignore_eos": True, "stop": ["x"]}, 0),
        ({"ignore_eos": False}, 0),
        ({"ignore_eos": False, "min_tokens": 12}, 12),
        ({"ignore_eos": True, "n": 3}, 90),
        ({"ignore_eos": True, "temperature": 0.0, "beam_width": 4}, 120),
    ],
)
def test_what_a_request_must_grow(params, must):
    bench = Bench()
    bench.add("a", prompt_of(10), **{"max_tokens": 30, **params})
    (state,) = bench.scheduler._requests.waiting
    assert state.must_grow == must
    bench.run()
    assert bench.scheduler._requests.must_grow == 0


def test_who_must_grow_joins_only_if_there_will_be_room():
    preemptions = {}
    for known in (True, False):
        bench = Bench(num_blocks=64, depth=2)
        bench.scheduler._forecast._tokens_of_a_step = 1  # to give way never pays
        stops = {} if known else {"stop_token_ids": [3]}
        for i in range(16):
            bench.add(f"r{i}", prompt_of(16, seed=i), max_tokens=200, seed=i, **stops)
        bench.run()
        preemptions[known] = bench.scheduler.stats().preemptions
    assert preemptions[True] == 0 < preemptions[False]


def test_an_answer_that_is_cut_short_from_outside_counts_as_one_that_ended_by_itself():
    bench = Bench(depth=2)
    bench.add("waits", prompt_of(10))
    bench.scheduler.abort("waits")
    assert bench.scheduler._forecast.growth == Forecast(16, 30).growth
    for i in range(100):  # as stop strings do, which are found where the text is made
        bench.add(f"r{i}", prompt_of(10), max_tokens=100, stop=["x"])
        for _ in range(6):
            bench.step()
        bench.scheduler.abort(f"r{i}")
    assert 0 < bench.scheduler._forecast.growth < SHARE_OF_MEAN * 10
