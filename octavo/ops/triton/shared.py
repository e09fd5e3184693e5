"""Attention over a beginning that many rows have in common: its keys are read once for all of them.

Decoding rows with a common beginning become one matrix of queries, as a prompt's are; every query sees every key of
the beginning, so nothing is masked. The rest of each row's keys is the decode kernel's, which joins both.

Shapes as in `octavo.ops`; G query heads a kv head, X parts, L tiles of rows.
"""

import torch
import triton
import triton.language as tl

from octavo.ops.triton.decode import PrefixParts
from octavo.ops.triton.tiles import LOG2_E, dot_precision, room, tanh

_QUERIES = 128  # of a tile: so many rows times G
_KEYS = 64
_PROGRAMS = 132


def rows_of_tile(group: int) -> int:
    """Rows that go together, for `group` query heads a kv head."""
    return max(1, _QUERIES // group)


def fits(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is shared memory for a tile."""
    return 3 * _QUERIES * dtype.itemsize * int(triton.next_power_of_2(head_dim)) <= room(device)


def shared_attention(
    q_RNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    block_tables_RM: torch.Tensor,
    lengths_R: torch.Tensor,
    tile_start_L: torch.Tensor,
    tile_rows_L: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> PrefixParts:
    """Each tile is `tile_rows_L` rows from `tile_start_L` on, whose first `lengths_R` keys are in the same blocks."""
    R, N, H = q_RNH.shape
    B, K = k_cache_PBKH.shape[1:3]
    group = N // K
    # In one wave: what the parts write and read again grows with their number.
    splits = min(8, max(1, _PROGRAMS // (triton.cdiv(R, rows_of_tile(group)) * K)))
    partial = torch.empty(R * N * splits * (H + 2), dtype=torch.float32, device=q_RNH.device)
    block_h = triton.next_power_of_2(H)
    wide = q_RNH.dtype == torch.float32 or block_h > 128
    keys = 32 if wide else _KEYS
    _shared[(K, len(tile_start_L), splits)](
        q_RNH,
        k_cache_PBKH,
        v_cache_PBKH,
        block_tables_RM,
        lengths_R,
        tile_start_L,
        tile_rows_L,
        partial,
        scale * LOG2_E,
        soft_cap * LOG2_E,
        R,
        q_RNH.stride(0),
        q_RNH.stride(1),
        block_tables_RM.stride(0),
        K=K,
        G=group,
        BLOCK_M=triton.next_power_of_2(rows_of_tile(group) * group),
        H=H,
        BLOCK_H=block_h,
        B=B,
        BLOCK_N=keys,
        CAPPED=soft_cap > 0,
        PRECISION=dot_precision(q_RNH.dtype),
        num_warps=8,
        num_stages=1 if q_RNH.dtype == torch.float32 else 3,
    )
    return PrefixParts(lengths_R, partial, splits, keys)


@triton.jit
def _shared(
    q,
    k_cache,
    v_cache,
    tables,
    lengths,
    tile_start,
    tile_rows,
    partial,
    scale,
    soft_cap,
    num_rows,
    q_stride,
    q_head_stride,
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    count = tl.load(tile_rows + tile)
    first_row = tl.load(tile_start + tile).to(tl.int64)
    length = tl.load(lengths + first_row, mask=count > 0, other=0)
    tiles_each = tl.cdiv(tl.cdiv(length, BLOCK_N), splits)
    start = split * tiles_each * BLOCK_N
    end = tl.minimum(start + tiles_each * BLOCK_N, length)
    if start >= end:
        return

    query = tl.arange(0, BLOCK_M)
    at = tl.arange(0, BLOCK_H)
    in_head = (at < H) | (H == BLOCK_H)  # known when the kernel is compiled, if nothing is padded
    row = first_row + query // G
    mine = query < count * G
    here = mine[:, None] & in_head[None, :]
    place = row * q_stride + (kv_head * G + query % G) * q_head_stride
    queries = tl.load(q + place[:, None] + at[None, :], mask=here, other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(tables + first_row * table_stride + key // B, mask=key < end, other=0).to(tl.int64)
        slot = block * (B * K * H) + (key % B * (K * H) + kv_head * H)
        inside = (key < end)[:, None] & in_head[None, :]
        keys = tl.load(k_cache + slot[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = soft_cap * tanh(scores / soft_cap)
        scores = tl.where((key < end)[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        fade = tl.exp2(best - better)
        values = tl.load(v_cache + slot[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        result = result * fade[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = better
    # [R, K, X, G, H] results, then [R, K, X, G] maxima and sums, as the decode kernel joins them
    place = ((row * K + kv_head) * splits + split) * G + query % G
    every = num_rows.to(tl.int64) * K * splits * G
    tl.store(partial + place[:, None] * H + at[None, :], result, mask=here)
    tl.store(partial + every * H + place, best, mask=mine)
    tl.store(partial + every * (H + 1) + place, total, mask=mine)
