"""Paged attention of rows with many queries: whole prompts, and chunks that follow cached tokens.

A program takes one query head and a tile of one row's queries, and walks over the row's keys up to the tile's own
positions: without a mask while every key is visible, then with one. Shapes as in `octavo.ops`.
"""

import torch
import triton
import triton.language as tl

from octavo.ops.triton import hopper_kernels

try:
    from octavo.ops.triton import hopper
except ImportError:  # `hopper_kernels` says why
    hopper = None  # type: ignore[assignment]

from octavo.ops.triton.tiles import LOG2_E, dot_precision, room, tanh


def prefill_attention(
    q_TNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    query_start_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    out_TNH: torch.Tensor,
    num_tokens: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    turn: torch.Tensor,
) -> None:
    """Writes `out_TNH` for the tokens of the given rows, `num_tokens` in all; tokens are counted from the batch's.

    `turn` is one int32 that is zero before and after.
    """
    if (
        not hopper_kernels.usable(q_TNH.device).attention
        and hopper.suits(q_TNH, k_cache_PBKH, sliding_window, soft_cap)
        and hopper.fills(q_TNH, k_cache_PBKH, num_tokens, len(seq_lens_R))
    ):
        hopper.attention(
            *(q_TNH, k_cache_PBKH, v_cache_PBKH, query_start_R1, seq_lens_R, block_tables_RM),
            *(out_TNH, num_tokens, scale, turn),
        )
    else:
        triton_attention(
            *(q_TNH, k_cache_PBKH, v_cache_PBKH, query_start_R1, seq_lens_R, block_tables_RM),
            *(out_TNH, num_tokens, scale, sliding_window, soft_cap),
        )


def triton_attention(
    q_TNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    query_start_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    out_TNH: torch.Tensor,
    num_tokens: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
) -> None:
    """See `prefill_attention`."""
    N, H = q_TNH.shape[1:]
    B, K = k_cache_PBKH.shape[1:3]
    R = len(seq_lens_R)
    block_h = triton.next_power_of_2(H)
    block_m, block_n, warps, stages = _tile(block_h, q_TNH.dtype, room(q_TNH.device))
    # Each row's last tile may be a part of one: this many tiles are enough, and the rest have nothing to do.
    tiles = num_tokens // block_m + R
    _prefill[(N, tiles)](
        q_TNH,
        k_cache_PBKH,
        v_cache_PBKH,
        block_tables_RM,
        seq_lens_R,
        query_start_R1,
        out_TNH,
        scale * LOG2_E,
        soft_cap * LOG2_E,
        sliding_window,
        R,
        q_TNH.stride(0),
        q_TNH.stride(1),
        block_tables_RM.stride(0),
        N=N,
        K=K,
        H=H,
        BLOCK_H=block_h,
        B=B,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        CAPPED=soft_cap > 0,
        WINDOWED=sliding_window > 0,
        PRECISION=dot_precision(q_TNH.dtype),
        num_warps=warps,
        num_stages=stages,
    )


def _tile(block_h: int, dtype: torch.dtype, room: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a tile in so much shared memory."""
    if block_h > 128 and room < 2**17:
        return (16, 16, 4, 1) if dtype == torch.float32 else (32, 32, 4, 1)
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if block_h > 128:
        return 64, 32, 4, 2
    return 64, 64, 4, 3


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    tables,
    seq_lens,
    query_start,
    out,
    scale,
    soft_cap,
    window,
    num_rows,
    q_stride,
    q_head_stride,
    table_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    kv_head = head // (N // K)
    # The latest tiles have the most keys, so they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    base = tl.load(query_start)
    left, right = 0, num_rows
    while left < right:
        middle = (left + right) // 2
        if (tl.load(query_start + middle) - base) // BLOCK_M + middle <= tile:
            left = middle + 1
        else:
            right = middle
    row = tl.cast(left - 1, tl.int64)
    first_token = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - first_token
    first_query = (tile - ((first_token - base) // BLOCK_M + row).to(tl.int32)) * BLOCK_M
    if first_query >= num_queries:
        return
    length = tl.load(seq_lens + row)
    first_position = length - num_queries + first_query

    query = first_query + tl.arange(0, BLOCK_M)
    position = length - num_queries + query
    token = (first_token + query).to(tl.int64)
    at = tl.arange(0, BLOCK_H)
    in_head = (at < H) | (H == BLOCK_H)  # known when the kernel is compiled, if nothing is padded
    here = (query < num_queries)[:, None] & in_head[None, :]
    queries = tl.load(q + token[:, None] * q_stride + head * q_head_stride + at[None, :], mask=here, other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)

    end = tl.minimum(first_position + BLOCK_M, length)
    whole_end = (first_position + 1) // BLOCK_N * BLOCK_N
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        whole_end = begin
    table = tables + row * table_stride
    for first in range(begin, whole_end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(table + key // B).to(tl.int64)
        place = block * (B * K * H) + (key % B * (K * H) + kv_head * H)
        keys = tl.load(k_cache + place[:, None] + at[None, :], mask=in_head[None, :], other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if CAPPED:
            scores = soft_cap * tanh(scores * (scale / soft_cap))
            better = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - better[:, None])
        else:  # one multiply-add an element
            better = tl.maximum(best, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - better[:, None])
        fade = tl.exp2(best - better)
        values = tl.load(v_cache + place[:, None] + at[None, :], mask=in_head[None, :], other=0.0).to(queries.dtype)
        result = result * fade[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = better
    for first in range(whole_end, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(table + key // B, mask=key < end, other=0).to(tl.int64)
        place = block * (B * K * H) + (key % B * (K * H) + kv_head * H)
        inside = (key < end)[:, None] & in_head[None, :]
        keys = tl.load(k_cache + place[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = soft_cap * tanh(scores / soft_cap)
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        # A query may see none of the keys so far: its maximum is still -inf, and -inf from itself would be NaN.
        reach = tl.where(better == float("-inf"), 0.0, better)
        weights = tl.exp2(scores - reach[:, None])
        fade = tl.exp2(best - reach)
        values = tl.load(v_cache + place[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        result = result * fade[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = better
    result = result / tl.maximum(total, 1e-30)[:, None]
    tl.store(out + (token[:, None] * N + head) * H + at[None, :], result.to(out.dtype.element_ty), mask=here)
