"""Paged attention of rows with a single query: what a decode step does.

A program takes one row, one kv head with all its query heads, and one split of the row's keys, so that the grid
depends on the number of rows alone and may live in a CUDA graph. The last split of a row to finish joins them all, and
what `shared` has computed over a beginning that the row has in common with others. What `rope_and_cache` does to a
step's heads can be done here too: each split turns the queries, and the one with the newest key that key.

Shapes as in `octavo.ops`; G query heads a kv head, X splits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.ops.triton.rope import Heads, keep, turned
from octavo.ops.triton.tiles import LOG2_E, dot_precision, fetch, tanh

# Programs that keep every multiprocessor of a large GPU busy. More of them cost more to join than they save; rows of
# unequal length are put in order instead.
_PROGRAMS = 132 * 2
MAX_SPLITS = 64
# Rows times kv heads from which on narrow programs are faster.
_MANY = 132
# A split of fewer keys costs more to join than it saves.
_LEAST_KEYS = 128


@dataclass(slots=True)
class PrefixParts:
    """Attention over beginnings that rows share, in X parts a row, to be joined with the rest of its keys.

    `lengths_R` says how many keys are done, 0 for rows that share nothing. `partial` holds [R, K, X, G, H] sums of
    values, then [R, K, X, G] maxima and sums of weights; `tile` keys is the unit that the parts are cut in.
    """

    lengths_R: torch.Tensor
    partial: torch.Tensor
    splits: int
    tile: int


def num_splits(rows: int, kv_heads: int) -> int:
    """Parts that each row's keys are cut into, a power of two."""
    wanted = -(-_PROGRAMS // (rows * kv_heads))
    return min(MAX_SPLITS, 1 << (wanted - 1).bit_length())


def decode_attention(
    q_RNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    out_RNH: torch.Tensor,
    counters: torch.Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    prefix: PrefixParts | None = None,
    heads: Heads | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Writes `out_RNH`. `counters` are zeros, at least one for each row and kv head, and zeros again afterwards.

    With `heads` the queries are theirs, still to be turned, as are the newest keys, which are not in the cache yet.
    """
    assert prefix is None or heads is None, "queries are turned before they meet a shared beginning"
    q_RNH = heads.q_TNH if heads else q_RNH
    k, v = (heads.k_TKH, heads.v_TKH) if heads else (q_RNH, q_RNH)
    R, N, H = q_RNH.shape
    B, K = k_cache_PBKH.shape[1:3]
    splits = num_splits(R, K)
    assert splits == 1 or len(counters) >= R * K, "a counter for each row and kv head"
    partial = torch.empty((R * N * splits * (H + 2),) if splits > 1 else (1,), dtype=torch.float32, device=q_RNH.device)
    block_h = triton.next_power_of_2(H)
    tile, stages = _tile(q_RNH.dtype, block_h)
    _decode[(K, R, splits)](
        q_RNH,
        k_cache_PBKH,
        v_cache_PBKH,
        block_tables_RM,
        seq_lens_R,
        out_RNH,
        partial,
        counters,
        prefix.lengths_R if prefix else seq_lens_R,
        prefix.partial if prefix else partial,
        k,
        v,
        heads.cos_Tr if heads else partial,
        heads.sin_Tr if heads else partial,
        heads.slots_T if heads else seq_lens_R,
        q_RNH if heads is None or heads.q_scale_T is None else heads.q_scale_T,
        q_RNH if heads is None or heads.q_norm_H is None else heads.q_norm_H,
        q_RNH if heads is None or heads.k_norm_H is None else heads.k_norm_H,
        heads.eps if heads else 0.0,
        scale * LOG2_E,
        soft_cap * LOG2_E,
        sliding_window,
        splits,
        q_RNH.stride(0),
        q_RNH.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        block_tables_RM.stride(0),
        N=N,
        K=K,
        G=N // K,
        BLOCK_G=max(16, triton.next_power_of_2(N // K)),
        HEADS=triton.next_power_of_2(N // K),
        H=H,
        BLOCK_H=block_h,
        B=B,
        BLOCK_N=tile,
        LEAST_TILES=_LEAST_KEYS // tile,
        CAPPED=soft_cap > 0,
        WINDOWED=sliding_window > 0,
        SPLIT=splits > 1,
        PREFIX_SPLITS=prefix.splits if prefix else 0,
        PREFIX_TILE=prefix.tile if prefix else 1,
        TURNING=heads is not None,
        HALF=heads.cos_Tr.shape[1] if heads else 0,
        NORMED=heads is not None and heads.q_norm_H is not None,
        SCALED=heads is not None and heads.q_scale_T is not None,
        PRECISION=dot_precision(q_RNH.dtype),
        PDL=pdl,
        num_warps=4 if R * K < _MANY else 2,
        num_stages=stages,
        launch_pdl=pdl,
    )


def _tile(dtype: torch.dtype, block_h: int) -> tuple[int, int]:
    """(keys, stages) of a tile."""
    return (32, 2) if dtype == torch.float32 or block_h > 128 else (64, 3)


@triton.jit
def _decode(
    q,
    k_cache,
    v_cache,
    tables,
    seq_lens,
    out,
    partial,
    counters,
    prefix_lengths,
    prefix_partial,
    k,
    v,
    cos,
    sin,
    slots,
    q_scale,
    q_norm,
    k_norm,
    eps,
    scale,
    soft_cap,
    window,
    splits,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    table_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    PREFIX_TILE: tl.constexpr,
    TURNING: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(seq_lens + row)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    if PREFIX_SPLITS > 0:
        begin = tl.load(prefix_lengths + row)
    tiles = tl.cdiv(length - begin, BLOCK_N)
    tiles_each = tl.maximum(tl.cdiv(tiles, splits), LEAST_TILES)
    working = tl.cdiv(tiles, tiles_each)
    if split >= tl.maximum(working, 1):
        return
    start = begin + split * tiles_each * BLOCK_N
    end = tl.minimum(start + tiles_each * BLOCK_N, length)

    group = tl.arange(0, BLOCK_G)
    at = tl.arange(0, BLOCK_H)
    in_head = (at < H) | (H == BLOCK_H)  # known when the kernel is compiled, if nothing is padded
    head = kv_head * G + group
    here = (group < G)[:, None] & in_head[None, :]
    if PDL:
        # Lengths, tables and all keys but this step's lie there since earlier steps, or since the step's first kernel,
        # which everything waits for: the first tiles are fetched while the kernel in front still computes queries.
        for tile in tl.static_range(LEAST_TILES):
            early = tl.minimum(start + tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.maximum(end - 1, 0))
            early_block = tl.load(tables + row * table_stride + early // B).to(tl.int64)
            early_block = tl.where(length > 0, early_block, 0)  # a padding row's table holds anything
            early_place = early_block * (B * K * H) + (early % B * (K * H) + kv_head * H)
            for line in tl.static_range(0, H, 64):
                fetch(k_cache + early_place + line)
                fetch(v_cache + early_place + line)
        gdc_wait()
    if TURNING:
        angles = row * HALF
        element, real = at[None, :], in_head[None, :]
        if (end == length) & (length > 0):
            slot = tl.load(slots + row).to(tl.int64)
            cache_at = (slot * K + kv_head) * H + element
            given = k + row * k_stride + kv_head * k_head_stride
            newest = turned(given, k_norm, cos + angles, sin + angles, element, real, eps, H, HALF, NORMED)
            keep(k_cache + cache_at, newest, real & (slot >= 0))
            value = tl.load(v + row * v_stride + kv_head * v_head_stride + element, mask=real, other=0.0)
            keep(v_cache + cache_at, value, real & (slot >= 0))
            tl.debug_barrier()
        given = q + row * q_stride + head[:, None] * q_head_stride
        queries = turned(given, q_norm, cos + angles, sin + angles, element, here, eps, H, HALF, NORMED)
        if SCALED:
            queries = (queries.to(tl.float32) * tl.load(q_scale + row)).to(queries.dtype)
    else:
        queries = tl.load(q + row * q_stride + head[:, None] * q_head_stride + at[None, :], mask=here, other=0.0)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    result = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(tables + row * table_stride + key // B, mask=key < end, other=0).to(tl.int64)
        place = block * (B * K * H) + (key % B * (K * H) + kv_head * H)
        inside = (key < end)[:, None] & in_head[None, :]
        keys = tl.load(k_cache + place[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = soft_cap * tanh(scores / soft_cap)
        seen = key < end
        if WINDOWED:
            seen &= key >= length - window
        scores = tl.where(seen[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        fade = tl.exp2(best - better)
        values = tl.load(v_cache + place[:, None] + at[None, :], mask=inside, other=0.0).to(queries.dtype)
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = better

    # From here on without the rows that only the matrix units wanted.
    if HEADS < BLOCK_G:
        real = group < G
        result = tl.sum(tl.reshape(tl.where(real[:, None], result, 0.0), [BLOCK_G // HEADS, HEADS, BLOCK_H]), 0)
        best = tl.sum(tl.reshape(tl.where(real, best, 0.0), [BLOCK_G // HEADS, HEADS]), 0)
        total = tl.sum(tl.reshape(tl.where(real, total, 0.0), [BLOCK_G // HEADS, HEADS]), 0)
    mine = tl.arange(0, HEADS)
    here = (mine < G)[:, None] & in_head[None, :]
    if SPLIT:  # noqa: SIM102 (known when the kernel is compiled, unlike what follows)
        if working > 1:
            # partial: [R, K, X, G, H] results, then [R, K, X, G] maxima and sums
            first_part = (row * K + kv_head) * splits
            every_part = tl.num_programs(1).to(tl.int64) * K * splits
            maxima = partial + every_part * G * H
            place = (first_part + split) * G + mine
            tl.store(partial + place[:, None] * H + at[None, :], result, mask=here)
            tl.store(maxima + place, best, mask=mine < G)
            tl.store(maxima + every_part * G + place, total, mask=mine < G)
            tl.debug_barrier()
            finished = tl.atomic_add(counters + row * K + kv_head, 1, sem="acq_rel")
            if finished < working - 1:
                return
            tl.store(counters + row * K + kv_head, 0)
            best = tl.full([HEADS], float("-inf"), tl.float32)
            total = tl.zeros([HEADS], tl.float32)
            result = tl.zeros([HEADS, BLOCK_H], tl.float32)
            for part in range(working):
                best, total, result = join(
                    best, total, result, partial, first_part + part, every_part, mine, at, here, G, H
                )
    if PREFIX_SPLITS > 0:
        prefix_tiles = tl.cdiv(begin, PREFIX_TILE)
        parts = tl.cdiv(prefix_tiles, tl.maximum(tl.cdiv(prefix_tiles, PREFIX_SPLITS), 1))
        first_part = (row * K + kv_head) * PREFIX_SPLITS
        all_parts = tl.num_programs(1).to(tl.int64) * K * PREFIX_SPLITS
        for part in range(parts):
            best, total, result = join(
                best, total, result, prefix_partial, first_part + part, all_parts, mine, at, here, G, H
            )
    result = result / tl.maximum(total, 1e-30)[:, None]
    place = (row * N + kv_head * G + mine[:, None]) * H + at[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def join(best, total, result, partial, part, parts, group, at, here, G: tl.constexpr, H: tl.constexpr):
    """Running maxima, sums and results, joined with part number `part` of the `parts` in `partial`."""
    place = part * G + group
    maxima = partial + parts * G * H
    its_best = tl.load(maxima + place, mask=group < G, other=0.0, cache_modifier=".cg")
    its_total = tl.load(maxima + parts * G + place, mask=group < G, other=0.0, cache_modifier=".cg")
    its_result = tl.load(partial + place[:, None] * H + at[None, :], mask=here, other=0.0, cache_modifier=".cg")
    better = tl.maximum(best, its_best)
    fade, weight = tl.exp2(best - better), tl.exp2(its_best - better)
    return better, total * fade + its_total * weight, result * fade[:, None] + its_result * weight[:, None]
