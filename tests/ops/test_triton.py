"""The Triton kernels under Triton's interpreter, for machines without a GPU: a few small shapes.

`tests/gpu` runs the same cases and more on the device.
"""

from types import SimpleNamespace

import pytest
import torch

from tests import interpreter

pytestmark = interpreter.MARKS
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cases():
    interpreter.start()
    from tests.ops import kernel_cases

    torch.manual_seed(0)
    return kernel_cases


@pytest.fixture(scope="module")
def ops(cases):
    return cases.TritonOps(CPU)


def test_norms(cases, ops):
    cases.check_norms(ops, CPU, torch.float32, 3, 24)
    cases.check_norms(ops, CPU, torch.float16, 2, 1100)


@pytest.mark.parametrize(("rotary", "norm"), [(16, False), (8, False), (16, True)])
def test_rope(cases, ops, rotary, norm):
    cases.check_rope(ops, CPU, torch.float32, (6, 2, 16), rotary, norm=norm)


@pytest.mark.parametrize("rows", [[(1, 1), (70, 1), (130, 1)], [(5, 1), (40, 40), (75, 12), (3, 1)]], ids=str)
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (9, 0.0), (0, 3.0)])
def test_attention(cases, ops, rows, window, cap):
    cases.check_attention(ops, CPU, torch.float32, (6, 2, 16), rows, window, cap)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (9, 3.0)])
def test_invariant_attention(cases, window, cap):
    rows = [(5, 1), (140, 1), (40, 40), (75, 12), (3, 1)]
    cases.check_attention(cases.TritonOps(CPU, 64), CPU, torch.float32, (6, 2, 16), rows, window, cap)


@pytest.mark.parametrize("window", [0, 50])
def test_a_query_is_the_same_bits_in_any_company(cases, window):
    cases.check_invariance(cases.TritonOps(CPU, 64), CPU, torch.float32, (4, 2, 16), 75, window, many=0)


@pytest.mark.parametrize("groups", [[(5, 32), (2, 0), (70, 16)], [(3, 160)]], ids=str)
def test_attention_over_shared_beginnings(cases, ops, groups):
    cases.check_shared(ops, CPU, torch.float32, (4, 2, 16), groups, cap=4.0)


@pytest.mark.parametrize(("rotary", "norm"), [(16, False), (8, True)])
def test_attention_that_turns_heads(cases, ops, rotary, norm):
    cases.check_turned(ops, CPU, torch.float32, (6, 2, 16), [1, 16, 40, 300], rotary, norm=norm)


def test_heads_are_turned_at_once_where_rows_have_several_tokens(ops):
    from octavo.ops import reference
    from octavo.ops.triton.fused import FusedOps

    q, k, v = torch.randn(3, 5, 2, 16)
    turn, slots, caches = torch.randn(5, 8), torch.arange(5, dtype=torch.int32), torch.zeros(2, 2, 16, 2, 16)
    which = FusedOps(ops, singles=False)
    found = which.rope_and_cache(q, k, v, turn.cos(), turn.sin(), *caches, slots)
    wanted = reference.rope_and_cache(q, k, v, turn.cos(), turn.sin(), *caches.clone(), slots)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 32, 24), (2, 640, 40), (3, 1024, 40), (5, 512, 512)])
@pytest.mark.parametrize("in_fp8", [False, True])
def test_fused_chain(cases, ops, rows, width, outputs, in_fp8):
    cases.check_fused(ops, CPU, torch.float32, rows, width, outputs, in_fp8=in_fp8)


def test_a_cache_in_fp8_is_read(cases, ops):
    # That it is written is for tests/gpu: the interpreter does not carry when it rounds to e4m3.
    cases.check_attention(ops, CPU, torch.float32, (4, 2, 16), [(70, 1), (40, 20)], kv=torch.float8_e4m3fn)
    cases.check_shared(ops, CPU, torch.float32, (4, 2, 16), [(5, 32)], kv=torch.float8_e4m3fn)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_products_of_any_number_of_rows(cases, ops, in_fp8):
    from octavo.ops.triton.product import product

    cases.check_linear(Products(product), CPU, torch.float32, 70, 72, 40, in_fp8=in_fp8)


class Products:
    """`Ops` with a product to be tested, and nothing else."""

    def __init__(self, product):
        self.linear = product


def test_a_step_that_goes_on_counts_for_itself(cases):
    cases.check_steps(CPU)


def test_products_that_add_themselves(cases, ops, monkeypatch):
    from octavo.ops.triton import fused

    added, addmm = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *given: (added.append(given), addmm(*given))[1])
    monkeypatch.setattr(fused, "LEAST_ADDED", 5)
    for rows in (4, 5):
        cases.check_added(ops, CPU, torch.float32, rows, 64, 48)
        assert len(added) == (2 if rows == 5 else 0)


def test_products_whose_weights_stream_are_taken_in(cases, ops, monkeypatch):
    """Which of them is asked for what; the kernels are for a GPU alone, so torch stands in for them."""
    from octavo.ops import reference
    from octavo.ops.triton import TritonOps, fused

    calls = []

    def write_product(x, weight, bias, out, *, pdl):
        calls.append("product")
        out.copy_(reference.linear(x, weight, bias))

    def in_parts(x, weight, *, pdl):
        calls.append("parts")
        half = x.shape[1] // 2
        return torch.stack((x[:, :half] @ weight.t()[:half], x[:, half:] @ weight.t()[half:]))

    def silu_product(x, weight, bias, *, pdl):
        calls.append("silu")
        return reference.silu_mul(reference.linear(x, weight, bias))

    stand_in = SimpleNamespace(write_product=write_product, in_parts=in_parts, silu_product=silu_product)
    monkeypatch.setattr(fused, "streamed", stand_in)
    monkeypatch.setattr(TritonOps, "_streams", lambda self, x, weight: len(x) >= 2)
    for rows in (1, 2, 5):
        calls.clear()
        cases.check_fused(ops, CPU, torch.float32, rows, 64, 48, in_fp8=False)
        # `hidden` has a second reader, which has it computed once more; `alone` is nobody's.
        assert calls == (["silu", "parts", "product", "product"] if rows > 1 else [])


def test_blocks_are_cleared(cases):
    cases.check_clear(CPU)
