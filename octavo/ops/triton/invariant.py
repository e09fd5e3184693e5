"""Paged attention in which a query's result has the same bits whatever else is computed beside it.

The keys of a row are cut at fixed positions, into segments. A segment's sums start from nothing, tile after tile of
keys, and segments are joined in order: by the program that computed them all, or from memory where several programs
shared them. Decoded tokens and chunks of any size go through the same tiles of the same shape, since the order of sums
inside a product or a reduction depends on that. Keys that a query does not see add exact zeros.

Shapes as in `octavo.ops`; G query heads a kv head, X segments.
"""

import torch
import triton
import triton.language as tl

from octavo.ops.triton.decode import num_splits
from octavo.ops.triton.tiles import LOG2_E, dot_precision, room, tanh

_LEAST_SEGMENT = 256
_MOST_SEGMENTS = 32


def segment_for(max_model_len: int) -> int:
    """Keys of a segment, for an engine whose sequences have at most so many tokens."""
    return max(_LEAST_SEGMENT, 1 << (-(-max_model_len // _MOST_SEGMENTS) - 1).bit_length())


def invariant_attention(
    q_TNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    query_start_R1: torch.Tensor | None,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    out_TNH: torch.Tensor,
    num_tokens: int,
    segment: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
) -> None:
    """Writes `out_TNH` for the tokens of the given rows, `num_tokens` in all; tokens are counted from the batch's.

    Without `query_start_R1` each row is one token, the batch's first ones.
    """
    N, H = q_TNH.shape[1:]
    B, K = k_cache_PBKH.shape[1:3]
    R, G = len(seq_lens_R), N // K
    block_h = triton.next_power_of_2(H)
    wide = q_TNH.dtype == torch.float32
    tight = block_h > 128 and room(q_TNH.device) < 2**17
    block_m = max((32 if wide else 64) // (2 if tight else 1), triton.next_power_of_2(G))
    block_n = 32 if wide or block_h > 128 else 64
    single = query_start_R1 is None
    splits = num_splits(R, K) if single else 1
    segments = triton.cdiv(block_tables_RM.shape[1] * B, segment)
    parts = R * N * segments if splits > 1 else 1
    partial = torch.empty(parts * (H + 2), dtype=torch.float32, device=q_TNH.device)
    tiles = R if single else num_tokens // (block_m // G) + R
    shape = {"N": N, "K": K, "G": G, "H": H, "BLOCK_H": block_h}
    _attend[(K, tiles, splits)](
        q_TNH,
        k_cache_PBKH,
        v_cache_PBKH,
        block_tables_RM,
        seq_lens_R,
        seq_lens_R if query_start_R1 is None else query_start_R1,
        out_TNH,
        partial,
        scale * LOG2_E,
        soft_cap * LOG2_E,
        sliding_window,
        R,
        segments,
        q_TNH.stride(0),
        q_TNH.stride(1),
        block_tables_RM.stride(0),
        **shape,
        B=B,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SEGMENT=segment,
        CAPPED=soft_cap > 0,
        WINDOWED=sliding_window > 0,
        SINGLE=single,
        SPLIT=splits > 1,
        PRECISION=dot_precision(q_TNH.dtype),
        num_warps=4,
        num_stages=1 if wide or tight else 2,
        enable_fp_fusion=False,
    )
    if splits > 1:
        _join_segments[(K, R)](
            partial,
            seq_lens_R,
            out_TNH,
            sliding_window,
            segments,
            **shape,
            BLOCK_G=triton.next_power_of_2(G),
            SEGMENT=segment,
            WINDOWED=sliding_window > 0,
            num_warps=4,
            enable_fp_fusion=False,
        )


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    tables,
    seq_lens,
    query_start,
    out,
    partial,
    scale,
    soft_cap,
    window,
    num_rows,
    segments,
    q_stride,
    q_head_stride,
    table_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    TOKENS: tl.constexpr = BLOCK_M // G
    if SINGLE:
        row = tl.program_id(1).to(tl.int64)
        first_token, num_queries, first_query = row, 1, 0
    else:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        base = tl.load(query_start)
        left, right = 0, num_rows
        while left < right:
            middle = (left + right) // 2
            if (tl.load(query_start + middle) - base) // TOKENS + middle <= tile:
                left = middle + 1
            else:
                right = middle
        row = tl.cast(left - 1, tl.int64)
        first_token = tl.load(query_start + row)
        num_queries = tl.load(query_start + row + 1) - first_token
        first_query = (tile - ((first_token - base) // TOKENS + row).to(tl.int32)) * TOKENS
        if first_query >= num_queries:
            return
    length = tl.load(seq_lens + row)
    first_position = length - num_queries + first_query
    member = tl.arange(0, BLOCK_M)
    query = first_query + member // G
    position = length - num_queries + query
    head = kv_head * G + member % G
    token = (first_token + query).to(tl.int64)
    at = tl.arange(0, BLOCK_H)
    mine = (query < num_queries) & (member < TOKENS * G)
    here = mine[:, None] & ((at < H) | (H == BLOCK_H))[None, :]
    place = token * q_stride + head * q_head_stride
    queries = tl.load(q + place[:, None] + at[None, :], mask=here, other=0.0)
    in_head = (at < H) | (H == BLOCK_H)

    last = tl.minimum(first_position + TOKENS, length)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // SEGMENT
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for number in range(begin + tl.program_id(2), tl.cdiv(last, SEGMENT), tl.num_programs(2)):
        its_best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        its_total = tl.zeros([BLOCK_M], tl.float32)
        its_result = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        end = tl.minimum((number + 1) * SEGMENT, last)
        for first in range(number * SEGMENT, end, BLOCK_N):
            key = first + tl.arange(0, BLOCK_N)
            block = tl.load(tables + row * table_stride + key // B, mask=key < end, other=0).to(tl.int64)
            slot = block * (B * K * H) + (key % B * (K * H) + kv_head * H)
            inside = (key < end)[:, None] & in_head[None, :]
            keys = tl.load(k_cache + slot[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if CAPPED:
                scores = soft_cap * tanh(scores / soft_cap)
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
            if WINDOWED:
                seen &= key[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
            better = tl.maximum(its_best, tl.max(scores, 1))
            # A query may see none of the keys so far: -inf from itself would be NaN.
            reach = tl.where(better == float("-inf"), 0.0, better)
            weights = tl.exp2(scores - reach[:, None])
            fade = tl.exp2(its_best - reach)
            values = tl.load(v_cache + slot[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
            its_result = its_result * fade[:, None]
            its_result = tl.dot(weights.to(values.dtype), values, its_result, input_precision=PRECISION)
            its_total = its_total * fade + tl.sum(weights, 1)
            its_best = better
        if SPLIT:
            # partial: [R, K, X, G, H] results, then [R, K, X, G] maxima and sums
            part = ((row * K + kv_head) * segments + number) * G + member
            every = (
                tl.num_programs(1).to(tl.int64) * N * segments
            )  # a program for each row: only single tokens are split
            tl.store(partial + part[:, None] * H + at[None, :], its_result, mask=here)
            tl.store(partial + every * H + part, its_best, mask=mine)
            tl.store(partial + every * (H + 1) + part, its_total, mask=mine)
        else:
            best, total, result = _joined(best, total, result, its_best, its_total, its_result)
    if not SPLIT:
        result = result / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + (token * N + head)[:, None] * H + at[None, :], result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _join_segments(
    partial,
    seq_lens,
    out,
    window,
    segments,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Joins the segments of a decoding row."""
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens + row)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0) // SEGMENT
    every = tl.num_programs(1).to(tl.int64) * N * segments
    group = tl.arange(0, BLOCK_G)
    at = tl.arange(0, BLOCK_H)
    mine = group < G
    here = mine[:, None] & (at < H)[None, :]
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    result = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    for number in range(begin, tl.cdiv(length, SEGMENT)):
        part = ((row * K + kv_head) * segments + number) * G + group
        its_best = tl.load(partial + every * H + part, mask=mine, other=0.0)
        its_total = tl.load(partial + every * (H + 1) + part, mask=mine, other=0.0)
        its_result = tl.load(partial + part[:, None] * H + at[None, :], mask=here, other=0.0)
        best, total, result = _joined(best, total, result, its_best, its_total, its_result)
    result = result / tl.maximum(total, 1e-30)[:, None]
    place = out + (row * N + kv_head * G + group)[:, None] * H + at[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _joined(best, total, result, its_best, its_total, its_result):
    """Running maxima, sums and results, joined with those of another segment."""
    better = tl.maximum(best, its_best)
    reach = tl.where(better == float("-inf"), 0.0, better)
    fade, weight = tl.exp2(best - reach), tl.exp2(its_best - reach)
    return better, total * fade + its_total * weight, result * fade[:, None] + its_result * weight[:, None]
