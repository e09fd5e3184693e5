"""Every kernel of every build that this processor can run, against the plain ops, over a grid of shapes."""

import numpy as np
import pytest
import torch

from octavo.batch import NO_TOKEN, NOT_FINITE
from octavo.config import SCALE_BYTES
from octavo.kernels import library
from octavo.kernels.weights import Packer, StoredRows
from octavo.ops import reference
from octavo.ops.cpu.eager import KernelOps
from octavo.runner import sampler
from octavo.runner.cpu import KernelDraw
from tests.builds import BUILDS_APART, kernels_of, needs_kernels
from tests.steps import columns

THREADS = 2
pytestmark = needs_kernels


@pytest.fixture(scope="module", params=BUILDS_APART)
def ops(request):
    return KernelOps(library.KernelThreads(kernels_of(request.param), THREADS))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(found, wanted):
    """The largest difference, as a share of the largest number."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (576, 960), (1536, 576), (80, 37), (48, 200)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13, 64, 256])
def test_linear(ops, inputs, outputs, tokens):
    x_TI, bias_O = torch.randn(tokens, inputs), torch.randn(outputs)
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        weight_OI = torch.randn(outputs, inputs, dtype=dtype)
        wanted = reference.linear(x_TI.double(), weight_OI.double(), bias_O.double())
        assert error(ops.linear(x_TI, weight_OI, bias_O), wanted) < most
        assert error(ops.linear(x_TI, weight_OI), wanted - bias_O) < most


def rounded(x_TI, group):
    """Activations as int8 kernels see them: a scale a token, or a token and group."""
    x = x_TI.unflatten(1, (-1, group or x_TI.shape[1]))
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale).flatten(1)


@pytest.mark.parametrize(("precision", "group"), [("int8", 0), ("int4", 32)])
@pytest.mark.parametrize("tokens", [1, 5, 40, 256])
def test_linear_of_few_bits(ops, precision, group, tokens):
    weight_OI, x_TI = torch.randn(200, 576), torch.randn(tokens, 576)
    rows = StoredRows("F32", (200, 576), weight_OI.numpy().view(np.uint8).reshape(-1))
    packed = Packer(ops.threads, precision, 2**22).pack([rows])
    # What the packed weights are, read back one input at a time.
    scale = weight_OI.unflatten(1, (-1, group or 576))
    extreme = scale.gather(2, scale.abs().argmax(-1, keepdim=True))
    if precision == "int8":
        weight_OI = ((scale / (extreme.abs() / 127)).round() * (extreme.abs() / 127)).flatten(1)
    else:
        step = (extreme / -8).half().float()
        weight_OI = ((scale / step).round().clamp(-8, 7) * step).flatten(1)
    wanted = reference.linear(rounded(x_TI, group).double(), weight_OI.double())
    assert error(ops.linear(x_TI, packed), wanted) < 2e-3  # a rounding may fall to the other side


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 200), (1536, 37), (96, 80)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_int8_keeps_what_stands_out(ops, inputs, outputs, tokens):
    """A few activations a thousand times the others cost the others nothing; each row alone gives the same bits."""
    weight_OI, x_TI = torch.randn(outputs, inputs), torch.randn(tokens, inputs)
    x_TI[:, [5, inputs - 1]] *= 500
    x_TI[::3, 7] *= -300
    rows = StoredRows("F32", (outputs, inputs), weight_OI.numpy().view(np.uint8).reshape(-1))
    packed = Packer(ops.threads, "int8", 2**22).pack([rows])
    found = ops.linear(x_TI, packed)
    scale = weight_OI.abs().amax(-1, keepdim=True) / 127
    wanted = reference.linear(x_TI.double(), ((weight_OI / scale).round() * scale).double())
    common = x_TI.abs().mean(-1, keepdim=True)
    rounding = torch.maximum(common * 8 / 127, x_TI.abs().amax(-1, keepdim=True) / 32384) / 2 * weight_OI.norm(dim=1)
    assert ((found - wanted).abs() < 5 * rounding).all()
    for row in range(tokens):
        assert torch.equal(ops.linear(x_TI[row : row + 1].contiguous(), packed), found[row : row + 1])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [16, 64, 80, 576])
def test_norms(ops, heads, width):
    x, weight = torch.randn(7, heads, width), torch.randn(width)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    x, residual = torch.randn(7, width), torch.randn(7, width) * 100
    for found, wanted in zip(
        ops.add_rms_norm(x, residual, weight, 1e-6), reference.add_rms_norm(x, residual, weight, 1e-6), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_silu_mul(ops):
    gate_up = torch.randn(9, 224) * 20
    gate_up[0, :4] = torch.tensor([-1000.0, 1000.0, 0.0, -80.0])
    torch.testing.assert_close(ops.silu_mul(gate_up), reference.silu_mul(gate_up), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding(ops, dtype):
    table, ids = torch.randn(50, 48).to(dtype), torch.tensor([3, 49, 0, 3])
    assert torch.equal(ops.embedding(ids, table), table.float()[ids])


CACHES = [torch.float32, torch.bfloat16, torch.int8]


def cache_of(blocks, block_size, K, H, dtype):
    return torch.zeros(blocks, block_size, K, H + (SCALE_BYTES if dtype == torch.int8 else 0), dtype=dtype)


def in_blocks(cache, order):
    """A cache in the kernels' order as [P, B, K, H], an int8 one with its scales; `order` is `k` or `v`."""
    P, B, K, H = cache.shape
    if cache.dtype == torch.int8:
        H -= SCALE_BYTES
        cache, scales = cache.view(P, K, -1).split((B * H, B * SCALE_BYTES), dim=-1)
        numbers = in_blocks(cache.reshape(P, B, K, H).view(torch.uint8), order).view(torch.int8)
        return torch.cat((numbers, scales.view(P, K, B, SCALE_BYTES).transpose(1, 2)), dim=-1)
    p = 4 // cache.element_size()
    if order == "k":
        return cache.reshape(P, K, H // p, B, p).permute(0, 3, 1, 2, 4).reshape(P, B, K, H)
    return cache.reshape(P, K, B // p, H, p).permute(0, 2, 4, 1, 3).reshape(P, B, K, H)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("block_size", [16, 48])
def test_rope_and_cache(ops, dtype, block_size):
    tokens, N, K, H, half = 11, 4, 2, 80, 24  # 48 of 80 elements turn
    q, k, v = torch.randn(tokens, N, H), torch.randn(tokens, K, H), torch.randn(tokens, K, H)
    angles, scale = torch.randn(tokens, half), torch.rand(tokens) + 0.5
    slots = torch.randperm(5 * block_size)[:tokens]
    k[3, 1], v[5, 0] = 0, 0
    caches = [cache_of(5, block_size, K, H, dtype) for _ in range(4)]
    found = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), *caches[:2], slots, scale)
    wanted = reference.rope_and_cache(q, k, v, angles.cos(), angles.sin(), *caches[2:], slots, scale)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(in_blocks(caches[1], "v"), caches[3])
    # A rotated key may be rounded to the other side.
    ours, theirs = (reference._in_fp32(cache) for cache in (in_blocks(caches[0], "k"), caches[2]))
    step = {"atol": float(theirs.abs().max()) / 127 * 1.01, "rtol": 0} if dtype == torch.int8 else {}
    torch.testing.assert_close(ours, theirs, **({"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else step))


def cached(ops, lens, N, K, H, block_size, dtype):
    """(the kernels' caches, the same in order, block tables) of random sequences in scattered blocks."""
    blocks = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks) + 3).int()
    tables = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
    ours = [cache_of(len(order), block_size, K, H, dtype) for _ in range(2)]
    first = 0
    for row, length in enumerate(lens):
        tables[row, : blocks[row]] = order[first : first + blocks[row]]
        first += blocks[row]
        places = torch.arange(length)
        slots = tables[row, places // block_size] * block_size + places % block_size
        q, k, v = torch.randn(length, N, H), torch.randn(length, K, H), torch.randn(length, K, H)
        ops.rope_and_cache(q, k, v, torch.ones(length, H // 2), torch.zeros(length, H // 2), *ours, slots)
    return ours, [in_blocks(cache, order) for cache, order in zip(ours, "kv", strict=True)], tables


def check_attention(ops, heads, dtype, lens, counts, window=0, soft_cap=0.0):
    """The last `counts` queries of sequences of `lens` tokens; `heads` are N, K, H and the block size."""
    N, K, H, block_size = heads
    ours, theirs, tables = cached(ops, lens, N, K, H, block_size, dtype)
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), N, H)
    positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lens, counts, strict=True)])
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    rest = (starts, seq_lens, tables, positions, starts.numpy(), seq_lens.numpy(), H**-0.5, window, soft_cap)
    found, wanted = ops.paged_attention(q, *ours, *rest), reference.paged_attention(q, *theirs, *rest)
    # Some 3 times the largest error of any build.
    most = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.int8: 1.4e-4}[dtype]
    assert error(found, wanted) < most


HEADS = [(9, 3, 64, 16), (4, 4, 80, 32), (8, 1, 96, 16), (6, 2, 128, 48), (2, 1, 256, 16)]  # N, K, H, block size


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (100, 0.0), (0, 5.0)])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", CACHES)
def test_attention(ops, heads, dtype, window, soft_cap):
    check_attention(ops, heads, dtype, [1300, 5, 33, 64, 700], [1, 5, 17, 1, 60], window, soft_cap)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", CACHES)
def test_attention_over_contexts_of_1_to_8192(ops, heads, dtype):
    lens = [1, 2, 15, 16, 17, 63, 65, 511, 512, 513, 2049, 4096, 8191, 8192]
    check_attention(ops, heads, dtype, lens, [1] * (len(lens) - 1) + [5])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", CACHES)
def test_attention_of_256_rows(ops, heads, dtype):
    check_attention(ops, heads, dtype, torch.randint(1, 90, (256,)).tolist(), [1] * 256)


def test_what_was_in_a_block_before_is_not_seen(ops):
    """A block may hold what a broken request left there: not a number, in an int8 cache as the scale of a token."""
    ours, _, tables = cached(ops, [40], 4, 2, 64, 16, torch.int8)
    starts, lens = torch.tensor([0, 1]), torch.tensor([37])
    rest = (starts, lens, tables, lens - 1, starts.numpy(), lens.numpy(), 0.125)
    q = torch.randn(1, 4, 64)
    wanted = ops.paged_attention(q, *ours, *rest)
    for cache in ours:
        cache[tables[0, 2]].view(2, -1)[:, -16 * SCALE_BYTES :].view(torch.float32)[:, 5:] = float("nan")
    assert torch.equal(ops.paged_attention(q, *ours, *rest), wanted)


@pytest.mark.parametrize("heads", [(6, 2, 64), (9, 3, 80), (1, 1, 32)], ids=str)
@pytest.mark.parametrize("dtype", CACHES)
def test_attention_is_the_same_in_any_company(ops, heads, dtype):
    """Each query of a long sequence by itself, in chunks of any length, and beside others: the same bits."""
    (N, K, H), length = heads, 1100
    ours, _, tables = cached(ops, [length, 300], N, K, H, 16, dtype)
    q = torch.randn(length, N, H)

    def attend(spans, row_of):
        starts = torch.tensor([0, *np.cumsum([last - first for first, last in spans])], dtype=torch.int32)
        lens = torch.tensor([last for _, last in spans], dtype=torch.int32)
        queries = torch.cat([q[first:last] for first, last in spans])
        rest = (starts, lens, tables[row_of], queries[:, 0, 0], starts.numpy(), lens.numpy(), H**-0.5)
        return ops.paged_attention(queries, *ours, *rest)

    whole = attend([(0, length)], [0])
    for first, last in ((0, 1), (511, 513), (1000, 1100), (1099, 1100), (700, 1000)):
        assert torch.equal(attend([(first, last)], [0]), whole[first:last])
        assert torch.equal(attend([(0, 300), (first, last), (299, 300)], [1, 0, 1])[300:-1], whole[first:last])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_linear_is_the_same_in_any_company(ops, precision):
    weight_OI = torch.randn(80, 576)
    rows = StoredRows("F32", (80, 576), weight_OI.numpy().view(np.uint8).reshape(-1))
    packed = Packer(ops.threads, precision, 2**20).pack([rows])
    x_TI = torch.randn(250, 576)
    whole = ops.linear(x_TI, packed)
    for first, last in ((0, 1), (3, 5), (10, 17), (40, 53), (9, 250)):
        assert torch.equal(ops.linear(x_TI[first:last].contiguous(), packed), whole[first:last])


def columns_of(count, **given):
    """Columns of so many samples with seeds of their own."""
    return columns(count, seed=np.arange(count, dtype=np.uint64), counter=np.arange(count), **given)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1e-6},
        {"temperature": 3.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": [0.0, 1.0] * 100, "top_k": [0, 3] * 100},
    ],
    ids=str,
)
def test_draws_are_those_of_torch(ops, given):
    """The noise is a function of the key and the token; only the last bits of logarithms differ."""
    for scale in (0.1, 3.0):
        logits_SV = torch.randn(200, 1003) * scale
        logits_SV[3, 10:] = float("-inf")
        found = KernelDraw(ops.threads)(logits_SV.clone().numpy(), columns_of(200, **given))
        assert found.tolist() == sampler.draw(logits_SV.clone(), columns_of(200, **given)).tolist()


@pytest.mark.parametrize("width", [40, 1003])
def test_a_row_without_a_possible_token_says_so(ops, width):
    """And the other rows are those of torch; whatever their logits, no token is outside the vocabulary or forbidden."""
    low, high, none = float("-inf"), float("inf"), float("nan")
    logits_SV = torch.randn(9, width)
    logits_SV[0] = low
    logits_SV[1] = none
    logits_SV[2, width - 1] = none
    logits_SV[3, 0] = none
    logits_SV[4, [7, 20]] = high
    logits_SV[5, 3:] = low
    logits_SV[6, : width - 1] = low
    logits_SV[7] = 3.4e38
    logits_SV[8] = -3.4e38
    for given in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1e-5},
        {"temperature": 1e6},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 2**31 - 1},
        {"temperature": 1.0, "top_p": 1e-30, "min_p": 1e-30},
        {"temperature": 2.0, "min_p": 1.0},
    ):
        found = KernelDraw(ops.threads)(logits_SV.clone().numpy(), columns_of(9, **given)).tolist()
        assert found == sampler.draw(logits_SV.clone(), columns_of(9, **given)).tolist(), given
        assert found[:5] == [NO_TOKEN, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE]
        assert 0 <= found[5] < 3
        assert found[6] == width - 1
        assert all(0 <= token < width for token in found[7:])


def test_equals_are_kept_or_dropped_together_and_the_first_wins(ops):
    logits_SV = torch.full((4, 50), -5.0)
    logits_SV[:, [7, 20, 33]] = 4.0
    draw = KernelDraw(ops.threads)
    assert draw(logits_SV.clone().numpy(), columns_of(4, temperature=0.0)).tolist() == [7] * 4
    seen = {
        int(t) for s in range(60) for t in draw(logits_SV.clone().numpy(), columns(4, temperature=1.0, top_k=1, seed=s))
    }
    assert seen == {7, 20, 33}
