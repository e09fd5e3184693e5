"""Cases for the ops of any device against the plain torch ones, which compute in fp32 or, here, in float64."""

from collections.abc import Callable

import numpy as np
import torch

from octavo.layers.quant import fp8
from octavo.ops import Ops, reference
from octavo.ops.triton import SharedPrefix, TritonOps
from octavo.ops.triton.blocks import clear_blocks, pointers_to
from octavo.ops.triton.fused import FusedOps
from octavo.ops.triton.prepare import Arrived, look_up, prepare, publish
from octavo.ops.triton.rope import rope_and_cache
from octavo.ops.triton.shared import rows_of_tile

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of `found`'s type, and finite."""
    assert found.shape == expected.shape
    bound = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), atol=bound, rtol=bound)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As `close`, of the whole: after several roundings a single element may be far off."""
    assert found.shape == expected.shape
    found, bound = found.double().cpu(), TOLERANCE[found.dtype]
    assert bool(((found - expected.cpu()).norm() <= bound / 2 * expected.cpu().norm()).item())


def check_norms(ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=device).to(dtype)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight, 1e-5))
    normed, stream = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(stream, x.double() + residual.double())
    close(normed, reference.rms_norm(stream.double(), weight, 1e-5))
    gate_up = torch.randn(rows, 2 * width, device=device).to(dtype)
    close(ops.silu_mul(gate_up), reference.silu_mul(gate_up.double()))


def check_rope(
    ops: Ops, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], rotary: int, *, norm: bool
) -> None:
    """Heads that lie side by side as the projection leaves them, written to scattered slots."""
    N, K, H = heads
    T, B, P = 7, 4, 6
    qkv = torch.randn(T, N + 2 * K, H, device=device).to(dtype)
    angles = torch.randn(T, rotary // 2, device=device)
    slots = torch.randperm(P * B, device=device)[:T].int()
    weights = [torch.randn(H, device=device).to(dtype) for _ in range(2)] if norm else [None, None]
    scale = torch.rand(T, device=device) + 1
    results = []
    for which, kind in ((ops, dtype), (reference, torch.float64)):
        caches = torch.zeros(2, P, B, K, H, device=device, dtype=kind)
        q, k, v = qkv.to(kind).split((N, K, K), dim=1)
        out = which.rope_and_cache(
            *(q, k, v, angles.cos(), angles.sin(), caches[0], caches[1], slots, scale, *weights, 1e-5)
        )
        results.append((out, caches))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def check_fp8_cache(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], bound: float) -> None:
    """What is written in e4m3 is what is written in `dtype`, rounded; too large numbers become 448."""
    N, K, H = heads
    T, B, P = 7, 4, 6
    qkv = (torch.randn(T, N + 2 * K, H, device=device) * 200).to(dtype)
    q, k, v = qkv.split((N, K, K), dim=1)
    v /= 100
    angles = torch.randn(T, H // 2, device=device)
    slots = torch.randperm(P * B, device=device)[:T].int()
    caches = []
    for kind in (dtype, torch.float8_e4m3fn):
        cache = torch.zeros(2, P, B, K, H, device=device).to(kind)
        rope_and_cache(q, k, v, angles.cos(), angles.sin(), cache[0], cache[1], slots)
        caches.append(cache.float())
    expected = caches[0].clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(caches[1], expected, atol=bound / 8, rtol=bound)


def check_linear(
    ops: Ops, device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int, *, in_fp8: bool
) -> None:
    """x may lie inside wider rows. Where x is rounded to e4m3 too, the error is that of its 3 bits."""
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)
    chosen = fp8.quantize(weight) if in_fp8 else weight
    found = ops.linear(x, chosen, bias)
    expected = reference.linear(x.double(), chosen, bias.double()) if in_fp8 else x.double() @ weight.double().T + bias
    if in_fp8 and rows >= 64 and dtype == torch.bfloat16 and device.type == "cuda":
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < 0.04 * expected.norm()
    else:
        close(found, expected)


def check_attention(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    rows: list[tuple[int, int]],
    window: int = 0,
    cap: float = 0.0,
    block_size: int = 16,
    kv: torch.dtype | None = None,
) -> None:
    """`rows` are (tokens with keys in the cache, queries among them); blocks lie in a shuffled order.

    The cache is of type `kv`, or else of the queries'.
    """
    N, K, H = heads
    lens, queries = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    counts = -(-lens // block_size)
    P = int(counts.sum()) + 3
    caches = torch.randn(2, P, block_size, K, H, device=device)
    # What lies behind a row's end belongs to nobody and may hold anything.
    tables = torch.full((len(rows), int(counts.max()) + 2), P - 1, dtype=torch.int32)
    order = torch.randperm(P - 1)
    for row, count in enumerate(counts):
        tables[row, :count], order = order[:count], order[count:]
        caches[:, tables[row, count - 1], lens[row] - (count - 1) * block_size :] = float("nan")
    caches[:, P - 1] = float("nan")
    caches = caches.to(kv or dtype)
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for n, m in rows]).astype(np.int32)
    q = torch.randn(int(starts[-1]), N, H, device=device).to(dtype)

    def run(which: Ops, caches: torch.Tensor) -> torch.Tensor:
        arrays = [torch.from_numpy(array).to(device) for array in (starts, lens)]
        return which.paged_attention(
            *(q, caches[0], caches[1], *arrays, tables.to(device), torch.from_numpy(positions).to(device)),
            *(starts, lens, H**-0.5, window, cap),
        )

    close(run(ops, caches), run(reference, caches.float().nan_to_num()))


def check_turned(
    ops: TritonOps,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    lengths: list[int],
    rotary: int,
    *,
    norm: bool,
) -> None:
    """Attention that turns queries and newest keys itself; the last row is padding."""
    N, K, H = heads
    B, R = 16, len(lengths) + 1
    counts = [-(-length // B) for length in lengths]
    order = torch.randperm(sum(counts)).int()
    tables = torch.zeros(R, max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count], order = order[:count], order[count:]
    slots = [int(tables[row, (n - 1) // B]) * B + (n - 1) % B for row, n in enumerate(lengths)]
    ints = {"dtype": torch.int32, "device": device}
    lens, slots_T = torch.tensor([*lengths, 0], **ints), torch.tensor([*slots, -1], **ints)
    qkv = torch.randn(R, N + 2 * K, H, device=device).to(dtype)
    angles = torch.randn(R, rotary // 2, device=device)
    weights = [torch.randn(H, device=device).to(dtype) for _ in range(2)] if norm else [None, None]
    factor = torch.rand(R, device=device) + 1
    old = torch.randn(2, sum(counts), B, K, H, device=device).to(dtype)
    results = []
    fused = FusedOps(ops, singles=True)
    for which, kind in ((fused, dtype), (reference, torch.float64)):
        caches = old.to(kind).clone()
        q, k, v = qkv.to(kind).split((N, K, K), dim=1)
        rows = R if which is fused else R - 1  # nobody but a recorded step has padding
        q, k, v, turn, places = (tensor[:rows] for tensor in (q, k, v, angles, slots_T))
        q = which.rope_and_cache(
            *(q, k, v, turn.cos(), turn.sin(), caches[0], caches[1], places, factor[:rows], *weights, 1e-5)
        )
        starts = np.arange(rows + 1, dtype=np.int32)
        out = which.paged_attention(
            *(q, caches[0], caches[1], torch.from_numpy(starts).to(device), lens[:rows], tables[:rows].to(device)),
            *(lens[:rows] - 1, starts, np.array(lengths, np.int32), H**-0.5),
        )
        results.append((out[: R - 1], caches))
    fused.finish()
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def check_shared(
    ops: TritonOps,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    groups: list[tuple[int, int]],
    cap: float = 0.0,
    kv: torch.dtype | None = None,
) -> None:
    """`groups` are (rows, keys that they share, a multiple of 16); each row has some keys of its own behind them."""
    N, K, H = heads
    size, per_tile = 16, rows_of_tile(N // K)
    tables, lens, lengths, tiles = [], [], [], []
    free = iter(torch.randperm(4000).tolist())
    for rows, keys in groups:
        tiles += [(len(lens) + i, min(per_tile, rows - i)) for i in range(0, rows if keys else 0, per_tile)]
        common = [next(free) for _ in range(keys // size)]
        for i in range(rows):
            lens.append(keys + 1 + 7 * i % 90)
            lengths.append(keys)
            tables.append(common + [next(free) for _ in range(-(-lens[-1] // size) - len(common))])
    tables_RM = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, table in enumerate(tables):
        tables_RM[row, : len(table)] = torch.tensor(table)
    caches = torch.randn(2, 4000, size, K, H, device=device).to(kv or dtype)
    q = torch.randn(len(tables), N, H, device=device).to(dtype)
    ints = {"dtype": torch.int32, "device": device}
    starts, seq_lens = np.arange(len(lens) + 1, dtype=np.int32), np.array(lens, np.int32)
    arguments = (
        *(q, caches[0], caches[1], torch.from_numpy(starts).to(device), torch.tensor(lens, **ints)),
        *(tables_RM.to(device), torch.tensor(lens, **ints) - 1, starts, seq_lens, H**-0.5, 0, cap),
    )
    # One tile more than there is work for, as in a recorded step.
    tile_start, tile_rows = (torch.tensor([*column, 0], **ints) for column in zip(*tiles, strict=True))
    prefix = SharedPrefix(torch.tensor(lengths, **ints), tile_start, tile_rows)
    close(ops.sharing(prefix).paged_attention(*arguments), reference.paged_attention(*arguments))


def check_invariance(
    ops: TritonOps,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    length: int,
    window: int = 0,
    kv: torch.dtype | None = None,
    many: int = 40,
) -> None:
    """The last query of a row of `length` tokens has the same bits in every kind of step."""
    N, K, H = heads
    size = 16
    blocks = -(-length // size)
    caches = torch.randn(2, 2 * blocks, size, K, H, device=device).to(kv or dtype)
    q = torch.randn(length, N, H, device=device).to(dtype)
    table, other = torch.randperm(2 * blocks).int().view(2, blocks)

    def last(rows: list[tuple[torch.Tensor, int, torch.Tensor]], which: int) -> torch.Tensor:
        """The last query of row `which`, each row being (table, tokens, queries of the last of them)."""
        lens = np.array([tokens for _, tokens, _ in rows], np.int32)
        starts = np.concatenate(([0], np.cumsum([len(queries) for *_, queries in rows]))).astype(np.int32)
        found = ops.paged_attention(
            *(torch.cat([queries for *_, queries in rows]), caches[0], caches[1]),
            *(torch.from_numpy(array).to(device) for array in (starts, lens)),
            *(torch.stack([its for its, *_ in rows]).to(device), torch.empty(0), starts, lens, H**-0.5, window),
        )
        return found[starts[which + 1] - 1]

    mine = (table, length, q[-1:])
    alone = last([mine], 0)
    assert torch.isfinite(alone).all()
    company = [(other, length - i % 9, q[i : i + 1]) for i in range(many)]
    for rows, which in (
        ([(table, length, q)], 0),
        ([(table, length, q[-7:])], 0),
        ([(other, length - 1, q[:-1]), mine], 1),
        ([mine, (other, length, q)], 0),
        ([*company, mine, *company * 4], many),
        ([(other, 20, q[:20]), (table, length, q[-33:])], 1),
    ):
        assert torch.equal(last(rows, which), alone)


def check_fused(
    ops: TritonOps, device: torch.device, dtype: torch.dtype, rows: int, width: int, outputs: int, *, in_fp8: bool
) -> None:
    """A chain of ops as a decoder layer makes it, in which some take in what stands in front of them."""

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    x, residual = tensor(rows, width) * width**0.5, tensor(rows, width)
    up, down, head, bias = tensor(2 * outputs, width), tensor(width, outputs), tensor(outputs, width), tensor(outputs)
    norm = tensor(width) * width**0.5
    if in_fp8:
        up, down, head = map(fp8.quantize, (up, down, head))

    def chain(which: Ops, kind: torch.dtype) -> list[torch.Tensor]:
        to = lambda tensor: tensor.to(kind) if isinstance(tensor, torch.Tensor) else tensor  # noqa: E731
        normed, stream = which.add_rms_norm(to(x), to(residual), to(norm), 1e-5)
        hidden = which.linear(which.silu_mul(which.linear(normed, to(up))), to(down))
        last, stream2 = which.add_rms_norm(hidden, stream, to(norm), 1e-5)
        alone = which.linear(hidden, to(head), to(bias))
        unread = which.silu_mul(torch.cat((stream, stream), dim=1))
        return [stream, hidden, last, stream2, alone, unread]

    which = FusedOps(ops, singles=True)
    found = chain(which, dtype)
    which.finish()
    for one, other in zip(found, chain(reference, torch.float64), strict=True):
        near(one, other)


def check_added(ops: TritonOps, device: torch.device, dtype: torch.dtype, rows: int, width: int, outputs: int) -> None:
    """Products that add themselves to the residual stream, in its own memory."""

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    x, residual, norm = tensor(rows, width) * width**0.5, tensor(rows, width), tensor(width) * width**0.5
    weights = [(tensor(2 * outputs, width), tensor(width, outputs)) for _ in range(2)]

    def chain(which: Ops, kind: torch.dtype) -> list[torch.Tensor]:
        normed, stream = which.add_rms_norm(x.to(kind), residual.to(kind), norm.to(kind), 1e-5)
        for up, down in weights:
            hidden = which.linear(which.silu_mul(which.linear(normed, up.to(kind))), down.to(kind))
            normed, stream = which.add_rms_norm(hidden, stream, norm.to(kind), 1e-5)
        return [normed, stream]

    which = FusedOps(ops, singles=False)
    found = chain(which, dtype)
    which.finish()
    for one, other in zip(found, chain(reference, torch.float64), strict=True):
        near(one, other)


def each_dtype(check: Callable[[torch.dtype], None]) -> None:
    for dtype in TOLERANCE:
        check(dtype)


def check_steps(device: torch.device) -> None:
    """A step that is sent, three that go on from it, and another that is sent: four rows, the last of them padding."""
    ints = {"dtype": torch.int32, "device": device}
    arrived = Arrived(
        control_2=torch.tensor([1, 1], **ints),
        blocks_TR=torch.tensor([[50, 51, 52, 53], [60, 61, 62, 63], [70, 71, 72, 73]], **ints),
        states_S=torch.tensor([2**40, -1, 5, 0], dtype=torch.int64, device=device),
        given_R=torch.tensor([7, -1, -3, 0], **ints),
        positions_R=torch.tensor([14, 3, 79, 0], **ints),
        slots_R=torch.tensor([9 * 16 + 14, 5 * 16 + 3, 4 * 16 + 15, -1], **ints),
        seq_lens_R=torch.tensor([15, 4, 80, 0], **ints),
        sample_of_row_R=torch.tensor([2, 0, 1, 0], **ints),
        width_1=torch.tensor([5], **ints),
        packed=torch.tensor([9, 0, 0, 0, 0, 5, 0, 0, 0, 0, 8, 7, 6, 3, 4, 0, 0, 0, 0, 0], **ints),
    )
    drawn, out = torch.tensor([11, 12, 13, 14], **ints), torch.zeros(3, 8, **ints)
    token_ids, tables = torch.zeros(4, **ints), torch.zeros(4, 7, **ints)
    cos, sin = torch.zeros(2, 4, 8, device=device)
    inv_freq = torch.rand(8, device=device)

    def step(tokens: list[int], positions: list[int], slots: list[int], turn: int) -> None:
        prepare(arrived, drawn, 16, inv_freq, 0.5, token_ids, cos, sin, tables)
        assert token_ids[:3].tolist() == tokens
        assert arrived.positions_R.tolist() == [*positions, 0]
        assert arrived.seq_lens_R.tolist() == [*(position + 1 for position in positions), 0]
        assert arrived.slots_R.tolist() == [*slots, -1]
        angle = arrived.positions_R[:, None].float() * inv_freq
        torch.testing.assert_close((cos, sin), (angle.cos() / 2, angle.sin() / 2), atol=1e-5, rtol=0)
        drawn.copy_(torch.tensor([20, 21, 22, 23], **ints) + 10 * turn)
        publish(drawn, arrived.control_2, out)
        assert arrived.control_2.tolist() == [turn, 0]
        assert out[turn, :4].tolist() == drawn.tolist()

    step([7, 11, 13], [14, 3, 79], [158, 83, 79], turn=1)
    assert arrived.states_S.tolist() == [2**40, -1, 5, 0]
    step([32, 30, 31], [15, 4, 80], [159, 84, 72 * 16], turn=2)
    step([42, 40, 41], [16, 5, 81], [50 * 16, 85, 72 * 16 + 1], turn=0)
    step([22, 20, 21], [17, 6, 82], [50 * 16 + 1, 86, 72 * 16 + 2], turn=1)
    assert arrived.states_S.tolist()[:3] == [2**40 + 3, 2, 8]
    assert tables[:3].tolist() == [[9, 50, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0], [8, 7, 6, 3, 4, 72, 0]]
    arrived.control_2.copy_(torch.tensor([2, 1], **ints))
    step([7, 30, 32], [17, 6, 82], [50 * 16 + 1, 86, 72 * 16 + 2], turn=2)
    assert look_up(torch.tensor([4, -1, -3], **ints), drawn).tolist() == [4, 40, 42]


def check_clear(device: torch.device) -> None:
    """Blocks of several caches, and none beside them."""
    caches = [torch.full((9, 4, 2, 6), 7, dtype=torch.bfloat16, device=device) for _ in range(5)]
    chosen = torch.tensor([8, 0, 3], dtype=torch.int32, device=device)
    clear_blocks(pointers_to(caches), chosen, caches[0][0].nbytes)
    for cache in caches:
        cleared = (cache.float() == 0).flatten(1).all(1).tolist()
        assert cleared == [block in (0, 3, 8) for block in range(9)]
        assert (cache[[1, 2, 4, 5, 6, 7]] == 7).all()
