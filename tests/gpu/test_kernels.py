"""The Triton kernels on the device, against the plain torch ops in float64."""

import pytest
import torch

cases = pytest.importorskip("tests.ops.kernel_cases", reason="needs triton", exc_type=ImportError)
sampling_cases = pytest.importorskip("tests.ops.sampling_cases", reason="needs triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
MIXED = [(5, 1), (1, 1), (700, 1), (2000, 1), (33, 33), (500, 500), (300, 17), (129, 128), (64, 1)]
SINGLES = [(length, 1) for length in (1, 15, 16, 17, 63, 64, 65, 129, 700, 3000)]


@pytest.fixture(scope="module")
def ops():
    torch.manual_seed(0)
    return cases.TritonOps(CUDA)


@pytest.mark.parametrize("width", [64, 576, 1024, 4096])
def test_norms(ops, width):
    cases.each_dtype(lambda dtype: cases.check_norms(ops, CUDA, dtype, 17, width))


@pytest.mark.parametrize("heads", [(16, 8, 128), (9, 3, 64), (4, 1, 256), (12, 12, 80)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_rope(ops, heads, norm):
    for rotary in (heads[2], heads[2] // 2):
        cases.each_dtype(lambda dtype, rotary=rotary: cases.check_rope(ops, CUDA, dtype, heads, rotary, norm=norm))


@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 128), (9, 3, 64), (8, 1, 256), (12, 12, 80)], ids=str)
@pytest.mark.parametrize("rows", [MIXED, SINGLES, [(4000, 1)], SINGLES * 20], ids=["mixed", "singles", "one", "many"])
def test_attention(ops, heads, rows):
    cases.each_dtype(lambda dtype: cases.check_attention(ops, CUDA, dtype, heads, rows))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("heads", [(16, 8, 128), (4, 4, 128), (12, 2, 64), (16, 1, 128)], ids=str)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("rows", ["prompts", "chunks", "many"])
def test_prefill_on_hopper(ops, monkeypatch, heads, block_size, rows):
    """Rows that end within a copy of 16 tokens, within a tile and at its end; tiles that see two tiles in part."""
    from octavo.ops.triton import hopper

    calls = []
    kernel = hopper.attention
    monkeypatch.setattr(hopper, "fills", lambda *args: True)
    monkeypatch.setattr(hopper, "attention", lambda *args: (calls.append(args), kernel(*args)))
    some = {
        "prompts": [(n, n) for n in (2, 15, 16, 17, 127, 128, 129, 300, 1000)],
        "chunks": [(200, 100), (128, 64), (1000, 2), (1025, 500), (513, 512), (640, 128)],
        "many": [(5 + 3 * i % 170, 2 + 5 * i % 4) for i in range(300)],
    }[rows]
    for dtype in (torch.bfloat16, torch.float16):
        for _ in range(2):
            cases.check_attention(ops, CUDA, dtype, heads, some, block_size=block_size)
    assert len(calls) == 4
    assert calls[0][-1].item() == 0, "the next call would leave out tiles"


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
def test_the_check_of_kernels_for_hopper(monkeypatch):
    """They are right; one that is not is found, and one that does not compile says why."""
    from octavo.ops.triton import hopper, hopper_check, hopper_kernels, streamed

    assert hopper_kernels._ask(torch.device("cuda:0")) == ({"attention": "", "streamed": ""}, "")
    product = streamed.product
    monkeypatch.setattr(streamed, "product", lambda *args, **named: product(*args, **named) + 1)
    monkeypatch.setattr(hopper, "_attention", None)
    found = hopper_check.check(CUDA)
    assert found["streamed"].startswith("ValueError: results differ by 1.0e+00")
    assert "NoneType" in found["attention"]


@pytest.mark.parametrize(("window", "cap"), [(100, 0.0), (0, 5.0), (33, 20.0)])
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_attention_with_window_and_cap(ops, window, cap, block_size):
    for dtype in (torch.bfloat16, torch.float32):
        cases.check_attention(ops, CUDA, dtype, (8, 2, 64), MIXED, window, cap, block_size)


@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 128), (9, 3, 64)], ids=str)
@pytest.mark.parametrize("groups", [[(256, 512)], [(3, 0), (9, 2048), (140, 256), (1, 0)], [(4, 1024)]], ids=str)
def test_attention_over_shared_beginnings(ops, heads, groups):
    for dtype in (torch.bfloat16, torch.float32):
        cases.check_shared(ops, CUDA, dtype, heads, groups)


@pytest.mark.parametrize("heads", [(16, 8, 128), (9, 3, 64), (8, 1, 256), (12, 12, 80)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", [[1, 16, 17, 700], [3000], [64, 129] * 16], ids=["few", "one", "many"])
def test_attention_that_turns_heads(ops, heads, norm, lengths):
    for rotary in (heads[2], heads[2] // 2):
        for dtype in (torch.bfloat16, torch.float32):
            cases.check_turned(ops, CUDA, dtype, heads, lengths, rotary, norm=norm)


@pytest.mark.parametrize(("width", "outputs"), [(1024, 3072), (4096, 1000), (2048, 8192), (576, 1536), (512, 512)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 40])
@pytest.mark.parametrize("in_fp8", [False, True])
def test_fused_chain(ops, rows, width, outputs, in_fp8):
    cases.each_dtype(lambda dtype: cases.check_fused(ops, CUDA, dtype, rows, width, outputs, in_fp8=in_fp8))


@pytest.mark.parametrize("rows", [64, 65, 300, 1500])
def test_products_that_add_themselves(ops, rows):
    cases.each_dtype(lambda dtype: cases.check_added(ops, CUDA, dtype, rows, 1024, 2048))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("rows", [2, 8, 9, 16, 31, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 1024), (4096, 6144), (12288, 4096), (896, 1250), (128, 8200)])
def test_products_whose_weights_stream(rows, inputs, outputs):
    """Outputs that end within a program, inputs that cannot be cut, one stage and many."""
    streamed = pytest.importorskip("octavo.ops.triton.streamed", reason="needs Triton 3.6", exc_type=ImportError)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(rows, inputs, device=CUDA).to(dtype)
        weight = (torch.randn(outputs, inputs, device=CUDA) * inputs**-0.5).to(dtype)
        bias = torch.randn(outputs, device=CUDA).to(dtype)
        assert streamed.suits(x, weight)
        wanted = x.double() @ weight.double().t()
        for _ in range(3):  # the next is launched while this one runs
            parts = streamed.in_parts(x, weight, pdl=True)
            alone = streamed.product(x, weight, None, pdl=True)
            biased = streamed.product(x, weight, bias, pdl=True)
            gated = streamed.silu_product(x, weight, bias, pdl=True)
        torch.testing.assert_close(parts.sum(0).double(), wanted, atol=1e-4, rtol=1e-4)
        cases.close(alone, wanted)
        cases.close(biased, wanted + bias)
        cases.close(gated, cases.reference.silu_mul(wanted + bias))
    assert len(streamed.in_parts(x, weight, pdl=True)) > 1 or outputs > 4224 or inputs % 256


@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 128), (9, 3, 64), (8, 1, 256), (12, 12, 80)], ids=str)
def test_invariant_attention(heads):
    ops = cases.TritonOps(CUDA, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cases.check_attention(ops, CUDA, dtype, heads, MIXED)
        cases.check_invariance(ops, CUDA, dtype, heads, 1300)
    cases.check_invariance(ops, CUDA, torch.bfloat16, heads, 1300, 300)
    cases.check_invariance(ops, CUDA, torch.bfloat16, heads, 1300, kv=torch.float8_e4m3fn)


@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 3072), (576, 960), (136, 100)])
def test_a_row_s_product_is_the_same_bits_in_any_company(inputs, outputs, in_fp8):
    ops = cases.TritonOps(CUDA, 256)
    for dtype in cases.TOLERANCE:
        weight = (torch.randn(outputs, inputs, device=CUDA) * inputs**-0.5).to(dtype)
        weight = cases.fp8.quantize(weight) if in_fp8 else weight
        x = torch.randn(600, inputs, device=CUDA).to(dtype)
        whole = ops.linear(x, weight)
        for rows in (1, 2, 16, 17, 64, 65, 128, 200, 257):
            assert torch.equal(ops.linear(x[300 : 300 + rows].clone(), weight), whole[300 : 300 + rows]), (dtype, rows)


@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 3072), (576, 960), (136, 100)])
@pytest.mark.parametrize("in_fp8", [False, True])
def test_products(ops, inputs, outputs, in_fp8):
    for rows in (1, 2, 3, 17, 64, 300):
        for dtype in (torch.bfloat16, torch.float16) if in_fp8 else cases.TOLERANCE:
            cases.check_linear(ops, CUDA, dtype, rows, inputs, outputs, in_fp8=in_fp8)


@pytest.mark.parametrize("heads", [(16, 8, 128), (9, 3, 64)], ids=str)
def test_fp8_cache(ops, heads):
    for dtype in (torch.bfloat16, torch.float16):
        cases.check_fp8_cache(CUDA, dtype, heads, bound=0.0)
        cases.check_attention(ops, CUDA, dtype, heads, MIXED, kv=torch.float8_e4m3fn)
        cases.check_attention(ops, CUDA, dtype, heads, SINGLES * 20, 100, 5.0, kv=torch.float8_e4m3fn)
        cases.check_shared(ops, CUDA, dtype, heads, [(3, 0), (9, 2048), (140, 256)], kv=torch.float8_e4m3fn)


def test_a_step_that_goes_on_counts_for_itself():
    cases.check_steps(CUDA)


@pytest.mark.parametrize("kind", sampling_cases.KINDS)
@pytest.mark.parametrize("vocab_size", [151_936, 32_003])
def test_draws_are_the_sampler_s(kind, vocab_size):
    torch.manual_seed(1)
    for dtype in cases.TOLERANCE:
        sampling_cases.check_alike(kind, dtype, 16, vocab_size, CUDA)


def test_draws_in_any_company():
    torch.manual_seed(2)
    for dtype in cases.TOLERANCE:
        sampling_cases.check_mixed(dtype, 151_936, CUDA)
        sampling_cases.check_edges(dtype, 300, CUDA)
        sampling_cases.check_many_groups(100, 64, 600, dtype, CUDA)


def test_penalties_are_for_a_token_that_only_the_device_knows():
    sampling_cases.check_penalties(CUDA)


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 1.0, 3e38])
@pytest.mark.parametrize("kind", [*sampling_cases.KINDS, "huge"])
def test_a_chunk_s_best_is_that_of_all_scores(kind, temperature):
    torch.manual_seed(3)
    for dtype in cases.TOLERANCE:
        for top_p in (1.0, 0.9):
            logits_SV = sampling_cases.logits(kind, 64, 151_936, CUDA).to(dtype)
            sampling_cases.check_scores(logits_SV, 151_930, temperature=temperature, top_p=top_p)


def test_blocks_are_cleared():
    cases.check_clear(CUDA)


def test_scores_at_the_ends():
    sampling_cases.check_no_numbers(CUDA)
    for seed, token in sampling_cases.ENDS:
        sampling_cases.check_ends(seed, token, CUDA)
