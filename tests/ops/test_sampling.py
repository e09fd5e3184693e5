"""The kernels that draw, under Triton's interpreter; `tests/gpu` runs the same cases on the device."""

import pytest
import torch

from tests import interpreter

pytestmark = interpreter.MARKS
CPU = torch.device("cpu")
KINDS = ("peaked", "flat", "wide", "ties", "constant", "forbidden", "one", "rivals")


@pytest.fixture(scope="module")
def cases():
    interpreter.start()
    from tests.ops import sampling_cases

    torch.manual_seed(0)
    return sampling_cases


@pytest.fixture
def small(cases, monkeypatch):
    """Chunks and tiles so small that little vocabularies have several, and lists do not fit one."""
    from octavo.ops.triton import sampling

    for name, value in (("_CHUNK", 512), ("_GROUP", 16), ("_TILE", 8)):
        monkeypatch.setattr(sampling, name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_sampler_s(cases, small, kind):
    cases.check_alike(kind, torch.bfloat16, 2, 1100, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draws_from_logits_of_other_types(cases, small, dtype):
    cases.check_alike("wide", dtype, 1, 600, CPU)
    cases.check_alike("ties", dtype, 1, 600, CPU)


def test_a_row_is_drawn_the_same_alone_and_in_a_batch(cases, small):
    cases.check_mixed(torch.bfloat16, 600, CPU)


def test_what_filters_leave(cases, small):
    cases.check_edges(torch.bfloat16, 25, CPU)


def test_top_k_over_many_groups(cases, small):
    cases.check_many_groups(9, 16, 30, torch.bfloat16, CPU)


def test_a_vocabulary_of_several_chunks(cases):
    cases.check_alike("peaked", torch.bfloat16, 1, 9000, CPU)


def test_penalties_are_for_a_token_that_only_the_device_knows(cases):
    cases.check_penalties(CPU)


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 1.0, 3e38])
@pytest.mark.parametrize("kind", [*KINDS, "huge"])
def test_a_chunk_s_best_is_that_of_all_scores(cases, small, kind, temperature):
    for top_p in (1.0, 0.9):
        cases.check_scores(cases.logits(kind, 6, 700, CPU).bfloat16(), 693, temperature=temperature, top_p=top_p)


def test_bounds_that_give_their_last_bits_to_the_piece_s_number(cases):
    """The most pieces, and scores so large that these bits are worth more than the noise."""
    for temperature in (0.05, 1.0):
        cases.check_scores(cases.logits("huge", 12, 8200, CPU), 8200, temperature=temperature)


def test_scores_of_other_types(cases, small):
    for dtype in (torch.float32, torch.float16):
        cases.check_scores(cases.logits("wide", 3, 700, CPU).to(dtype), 700)


def test_logits_that_are_no_numbers(cases, small):
    cases.check_no_numbers(CPU)


def test_the_ends_of_noise(cases, small):
    for seed, token in cases.ENDS:
        cases.check_ends(seed, token, CPU)


def test_bounds_alone_do_not_decide(cases, small, monkeypatch):
    """What the tests above would say if only the piece of the largest bound were scored; and what if all were."""
    from octavo.ops.triton import sampling

    logits_SV = cases.logits("rivals", 12, 700, CPU)
    monkeypatch.setattr(sampling, "_SLACK", 1e9)
    cases.check_scores(logits_SV, 700)
    monkeypatch.setattr(sampling, "_SLACK", -1e9)
    with pytest.raises(AssertionError):
        cases.check_scores(logits_SV, 700)
