"""The plain torch ops against the formulae written out in loops, in float64."""

import math

import numpy as np
import pytest
import torch

from octavo.ops import reference as ops


def test_norms() -> None:
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)
    normed, stream = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(stream, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-5))
    assert ops.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5).dtype == torch.bfloat16


def test_silu_mul() -> None:
    x = torch.randn(3, 14)
    torch.testing.assert_close(ops.silu_mul(x), x[:, :7] / (1 + torch.exp(-x[:, :7])) * x[:, 7:])


@pytest.mark.parametrize("rotary", [8, 4])
def test_rope_turns_pairs_and_writes_slots(rotary: int) -> None:
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    angles = torch.randn(3, rotary // 2)
    caches = torch.zeros(2, 5, 4, 2, 8)
    slots = torch.tensor([17, 2, 0], dtype=torch.int32)
    out = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), caches[0], caches[1], slots)

    def turned(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        half = rotary // 2
        for i in range(half):
            pair = torch.complex(x[..., i], x[..., i + half]) * torch.polar(torch.ones(3, 1), angles[:, i : i + 1])
            y[..., i], y[..., i + half] = pair.real, pair.imag
        return y

    torch.testing.assert_close(out, turned(q))
    for token, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(caches[0, slot // 4, slot % 4], turned(k)[token])
        assert torch.equal(caches[1, slot // 4, slot % 4], v[token])
    assert int((caches[1] != 0).any(-1).any(-1).sum()) == 3
    keys = caches[0].clone()
    scale = torch.tensor([1.0, 1.25, 3.0])
    scaled = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), caches[0], caches[1], slots, scale)
    torch.testing.assert_close(scaled, turned(q) * scale[:, None, None])
    assert torch.equal(caches[0], keys), "keys are not scaled"


def plain_attention(q, keys, values, position, scale, window, cap):  # type: ignore[no-untyped-def]
    """One query [H] over all keys [L, H], in float64."""
    scores = []
    for i, key in enumerate(keys.double()):
        score = float(q.double() @ key) * scale
        score = cap * math.tanh(score / cap) if cap else score
        scores.append(score if i <= position and (not window or i > position - window) else -math.inf)
    return torch.softmax(torch.tensor(scores, dtype=torch.float64), 0) @ values.double()


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (9, 3), (4, 1)])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (5, 0.0), (1, 0.0), (0, 2.0), (7, 0.5)])
@pytest.mark.parametrize("tile", [2**24, 200])
def test_attention(heads: tuple[int, int], window: int, cap: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_TILE", tile)
    torch.manual_seed(0)
    N, K = heads
    H, B, P = 8, 4, 40
    lens, queries = [9, 1, 30, 3, 17, 90 % 31, 4], [1, 1, 12, 3, 1, 1, 1]
    k_cache, v_cache = torch.randn(P, B, K, H), torch.randn(P, B, K, H)
    free = torch.randperm(P).tolist()
    tables = torch.zeros(len(lens), 8, dtype=torch.int32)
    for row, length in enumerate(lens):
        for i in range(-(-length // B)):
            tables[row, i] = free.pop()
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lens, queries, strict=True)])
    q = torch.randn(int(starts[-1]), N, H)
    out = ops.paged_attention(
        *(q, k_cache, v_cache, torch.from_numpy(starts), torch.tensor(lens, dtype=torch.int32), tables),
        torch.from_numpy(positions.astype(np.int32)),
        *(starts, np.array(lens, np.int32), 0.3, window, cap),
    )
    for row, length in enumerate(lens):
        keys = k_cache[tables[row].long()].flatten(0, 1)[:length]
        values = v_cache[tables[row].long()].flatten(0, 1)[:length]
        for token in range(starts[row], starts[row + 1]):
            for head in range(N):
                kv = head // (N // K)
                expected = plain_attention(
                    q[token, head], keys[:, kv], values[:, kv], positions[token], 0.3, window, cap
                )
                torch.testing.assert_close(out[token, head].double(), expected, atol=1e-5, rtol=1e-5)


def test_single_tokens_of_many_rows_go_in_few_tiles() -> None:
    starts = np.arange(65, dtype=np.int32)
    assert len(ops._tiles(starts, np.full(64, 300, np.int32), 9, 384)) == 1
    tiles = ops._tiles(starts, np.arange(1, 65, dtype=np.int32) * 100, 9, 384)
    assert sorted(row for rows, _, _ in tiles for row in rows) == list(range(64))
    assert len(tiles) < 12


def test_copied_blocks_are_read_before_they_are_overwritten() -> None:
    caches = [torch.randn(6, 2, 1, 4) for _ in range(3)]
    before = [cache.clone() for cache in caches]
    ops.copy_blocks(caches, torch.tensor([[0, 1], [1, 5]], dtype=torch.int32))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[0, 0, 2, 3, 4, 1]])
