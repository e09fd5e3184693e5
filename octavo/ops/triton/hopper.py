"""Paged attention of rows with many queries on Hopper (sm_90): warps that copy, two warpgroups that multiply.

A program takes one kv head at a time and 128 of a row's (query, head of the group) pairs, so a short chunk of queries
still fills a tile. One warp draws tiles from a counter; two read the block table and bring keys and values, a bulk copy
(TMA) for 16 tokens of 64 columns. Each of two warpgroups owns 64 pairs: while its matrix unit adds up the values of one
tile of keys, it computes the softmax of the next. Tiles of keys go from the last to the first, so that few need a mask.

Shapes as in `octavo.ops`. No windows, no soft caps; `suits` says what it takes.
"""

import torch

from octavo.ops.triton.gluon import (
    TensorDescriptor,
    async_load,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from octavo.ops.triton.tiles import LOG2_E, capability, processors

_PAIRS = 128  # of a query and a head, in a tile
_KEYS = 128
_BOX = 16  # tokens in a copy
_STAGES = 2
_QUERY_STAGES = 2
_REGISTERS = 240  # of a thread that multiplies; the others share what is left of 504


def suits(q_TNH: torch.Tensor, k_cache_PBKH: torch.Tensor, sliding_window: int, soft_cap: float) -> bool:
    """Whether `attention` takes these."""
    H, B = q_TNH.shape[2], k_cache_PBKH.shape[1]
    return (
        capability(q_TNH.device)[0] == 9
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and k_cache_PBKH.dtype == q_TNH.dtype
        and H in (64, 128)
        and B % _BOX == 0
        and sliding_window == 0
        and soft_cap == 0.0
        and k_cache_PBKH.is_contiguous()
    )


def fills(q_TNH: torch.Tensor, k_cache_PBKH: torch.Tensor, num_tokens: int, num_rows: int) -> bool:
    """Whether there are tiles for all of the GPU: smaller ones are faster where there are not."""
    items = _items(num_tokens, num_rows, q_TNH.shape[1], k_cache_PBKH.shape[2])
    return items >= processors(q_TNH.device)


def _heads(N: int, K: int) -> int:
    """How many heads of a group share a tile: as many as a power of two allows."""
    return min(N // K & -(N // K), _PAIRS // 2)


def _items(num_tokens: int, num_rows: int, N: int, K: int) -> int:
    """Tiles of all groups of heads. Each row's last may be a part of one: these are enough, some have nothing to do."""
    F = _heads(N, K)
    return (num_tokens * F // _PAIRS + num_rows) * (N // F)


def attention(
    q_TNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    query_start_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    out_TNH: torch.Tensor,
    num_tokens: int,
    scale: float,
    turn: torch.Tensor,
) -> None:
    """See `prefill.prefill_attention`. `turn` is one int32, zero before and after: which tile is the next."""
    T, N, H = q_TNH.shape
    P, B, K = k_cache_PBKH.shape[:3]
    R = len(seq_lens_R)
    F = _heads(N, K)
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    queries = TensorDescriptor(q_TNH, [T, N, H], list(q_TNH.stride()), [_PAIRS // 2 // F, F, 64], swizzled)
    caches = (
        TensorDescriptor(cache, [P, B, K * H], [B * K * H, K * H, 1], [1, _BOX, 64], swizzled)
        for cache in (k_cache_PBKH, v_cache_PBKH)
    )
    items = _items(num_tokens, R, N, K)
    programs = min(items, processors(q_TNH.device))
    _attention[(programs,)](
        queries,
        *caches,
        block_tables_RM,
        seq_lens_R,
        query_start_R1,
        out_TNH,
        turn,
        scale * LOG2_E,
        R,
        items,
        P,
        block_tables_RM.stride(0),
        N=N,
        K=K,
        F=F,
        H=H,
        B=B,
        M=_PAIRS,
        KEYS=_KEYS,
        BOX=_BOX,
        STAGES=_STAGES,
        QUERY_STAGES=_QUERY_STAGES,
        REGISTERS=_REGISTERS,
        num_warps=4,
        maxnreg=168,
    )


# One compilation takes seconds, and none of these numbers and addresses makes a difference to it.
@gluon.jit(
    do_not_specialize=["num_rows", "items", "num_blocks", "table_stride"],
    do_not_specialize_on_alignment=["tables", "seq_lens", "query_start"],
)
def _attention(
    queries_of_all,
    k_cache,
    v_cache,
    tables,
    seq_lens,
    query_start,
    out,
    turn,
    scale,
    num_rows,
    items,
    num_blocks,
    table_stride,
    N: gl.constexpr,
    K: gl.constexpr,
    F: gl.constexpr,
    H: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    KEYS: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = k_cache.dtype
    # A box is 16 tokens of 64 columns; the boxes of one half of the columns, in a row, make up a swizzled tile.
    boxes: gl.constexpr = [STAGES * (KEYS // BOX) * (H // 64), 1, BOX, 64]
    keys = gl.allocate_shared_memory(dtype, boxes, k_cache.layout)
    values = gl.allocate_shared_memory(dtype, boxes, v_cache.layout)
    halves: gl.constexpr = [QUERY_STAGES * 2 * (H // 64), M // 2 // F, F, 64]
    queries = gl.allocate_shared_memory(dtype, halves, queries_of_all.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    notes = gl.allocate_shared_memory(gl.int32, [QUERY_STAGES * 8, 1], bar)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    noted = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], bar)
    draw = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    mbarrier.init(draw.index(0), count=1)
    queries_full = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], bar)
    queries_free = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=2)
        mbarrier.init(values_full.index(i), count=1)
        mbarrier.init(values_free.index(i), count=2)
    for i in gl.static_range(QUERY_STAGES):
        mbarrier.init(noted.index(i), count=1)
        mbarrier.init(queries_full.index(i), count=1)
        mbarrier.init(queries_free.index(i), count=4)
    rows = (query_start, seq_lens, num_rows, items)
    sizes: gl.constexpr = (N, K, F, H, B, M, KEYS, BOX, STAGES, QUERY_STAGES)
    bars = (keys_full, keys_free, values_full, values_free, queries_full, queries_free)
    buffers = (queries, keys, values, notes)
    plans = (noted, queries_full, queries_free, draw)
    paging = (notes, noted, draw, queries_free, tables, table_stride, num_blocks)
    gl.warp_specialize(
        [
            (_multiply, (out, scale, buffers, bars, 0, sizes)),
            (_multiply, (out, scale, buffers, bars, 1, sizes)),
            (_plan, (rows, queries_of_all, turn, buffers, plans, sizes)),
            (_copy, (k_cache, keys, keys_full, keys_free, paging, True, sizes)),
            (_copy, (v_cache, values, values_full, values_free, paging, False, sizes)),
        ],
        [4, 1, 1, 1],
        [REGISTERS, 504 - 2 * REGISTERS, 504 - 2 * REGISTERS, 504 - 2 * REGISTERS],
    )


@gluon.jit
def _find(item, rows, sizes: gl.constexpr):
    """Of a tile and group of heads: the row, its first token and its numbers of queries and of keys, the group, the
    first pair of the tile, and how many tiles of keys it sees: 0 if there is nothing to do."""
    query_start, seq_lens, num_rows, items = rows
    F: gl.constexpr = sizes[2]
    GROUPS: gl.constexpr = sizes[0] // F
    M: gl.constexpr = sizes[5]
    KEYS: gl.constexpr = sizes[6]
    # The latest tiles have the most keys, so they start first.
    tile = items // GROUPS - 1 - item // GROUPS
    base = gl.load(query_start)
    row = -1
    for some in range(0, num_rows, 128):
        at = some + gl.arange(0, 128, gl.BlockedLayout([4], [32], [1], [0]))
        start = gl.load(query_start + at, mask=at < num_rows, other=0) - base
        row += gl.sum(((at < num_rows) & (start * F // M + at <= tile)).to(gl.int32), 0)
    first_token = gl.load(query_start + row)
    num_queries = gl.load(query_start + row + 1) - first_token
    length = gl.load(seq_lens + row)
    first = (tile - ((first_token - base) * F // M + row)) * M
    last_query = gl.minimum((first + M - 1) // F, num_queries - 1)
    tiles = gl.where(first < num_queries * F, gl.cdiv(length - num_queries + last_query + 1, KEYS), 0)
    return row, first_token, num_queries, length, item % GROUPS, first, tiles


@gluon.jit
def _note(notes, place, which: gl.constexpr, value):
    notes.index(place * 8 + which).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _noted(notes, place, which: gl.constexpr):
    return gl.max(notes.index(place * 8 + which).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _plan(rows, queries_of_all, turn, buffers, bars, sizes: gl.constexpr):
    """The warp that draws tiles, writes down for the others what they are, and copies their queries."""
    noted, queries_full, queries_free, draw = bars
    queries, _keys, _values, notes = buffers
    items = rows[3]
    F: gl.constexpr = sizes[2]
    H: gl.constexpr = sizes[3]
    M: gl.constexpr = sizes[5]
    QUERY_STAGES: gl.constexpr = sizes[9]
    HALVES: gl.constexpr = H // 64
    found = 0
    item = gl.program_id(0)
    while item < items:
        row, first_token, num_queries, length, group, first, tiles = _find(item, rows, sizes)
        if tiles > 0:
            place = found % QUERY_STAGES
            mbarrier.wait(queries_free.index(place), (found // QUERY_STAGES) & 1 ^ 1)
            _note(notes, place, 0, first_token)
            _note(notes, place, 1, num_queries)
            _note(notes, place, 2, length)
            _note(notes, place, 3, group)
            _note(notes, place, 4, first)
            _note(notes, place, 5, tiles)
            _note(notes, place, 6, row)
            mbarrier.arrive(noted.index(place), count=1)
            mbarrier.expect(queries_full.index(place), M * H * 2)
            for w in gl.static_range(2):
                for h in gl.static_range(HALVES):
                    async_load(
                        queries_of_all,
                        [first_token + first // F + w * (M // 2 // F), group * F, h * 64],
                        queries_full.index(place),
                        queries.index((place * 2 + w) * HALVES + h),
                    )
            # Not earlier, or programs would hold work that others could begin.
            mbarrier.wait(draw.index(0), found & 1)
            found += 1
        drawn = gl.atomic_add(turn, 1, sem="relaxed")
        if drawn == items - 1:  # the last of all programs: as many draws as items
            gl.store(turn, 0)
        item = drawn + gl.num_programs(0)
    place = found % QUERY_STAGES
    mbarrier.wait(queries_free.index(place), (found // QUERY_STAGES) & 1 ^ 1)
    _note(notes, place, 5, 0)
    mbarrier.arrive(noted.index(place), count=1)
    mbarrier.arrive(queries_full.index(place), count=1)


@gluon.jit
def _copy(cache, to, full, free, paging, DRAWS: gl.constexpr, sizes: gl.constexpr):
    """A warp that copies the keys, or the values.

    Behind the row's end copies read beyond the cache, and thereby zeros. A last box that is filled in part moves down
    as far, so that its zeros come first: see `_mask_top`.
    """
    notes, noted, draw, queries_free, tables, table_stride, num_blocks = paging
    F: gl.constexpr = sizes[2]
    G: gl.constexpr = sizes[0] // sizes[1]
    H: gl.constexpr = sizes[3]
    B: gl.constexpr = sizes[4]
    KEYS: gl.constexpr = sizes[6]
    BOX: gl.constexpr = sizes[7]
    STAGES: gl.constexpr = sizes[8]
    QUERY_STAGES: gl.constexpr = sizes[9]
    PARTS: gl.constexpr = KEYS // BOX
    HALVES: gl.constexpr = H // 64
    done = 0
    found = 0
    more = True
    while more:
        place = found % QUERY_STAGES
        mbarrier.wait(noted.index(place), (found // QUERY_STAGES) & 1)
        length = _noted(notes, place, 2)
        column = _noted(notes, place, 3) * F // G * H
        tiles = _noted(notes, place, 5)
        table = tables + _noted(notes, place, 6).to(gl.int64) * table_stride
        mbarrier.arrive(queries_free.index(place), count=1)
        more = tiles > 0
        found += 1
        for j in range(tiles):
            start = (tiles - 1 - j) * KEYS
            blocks = ()
            for part in gl.static_range(PARTS):
                key = start + part * BOX
                blocks = blocks + (gl.load(table + key // B, mask=key < length, other=num_blocks),)  # type: ignore[assignment] # noqa: RUF005
            if DRAWS:
                mbarrier.arrive(draw.index(0), count=1, pred=j == gl.maximum(tiles - 2, 0))
            stage = done % STAGES
            mbarrier.wait(free.index(stage), (done // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), KEYS * H * 2)
            for part in gl.static_range(PARTS):
                key = start + part * BOX
                token = key % B + gl.minimum(gl.maximum(length - key, 0) - BOX, 0)
                for h in gl.static_range(HALVES):
                    box = to.index((stage * HALVES + h) * PARTS + part)
                    async_load(cache, [blocks[part], token, column + h * 64], full.index(stage), box)
            done += 1


@gluon.jit
def _mask_top(scores, position, start, length, column, BOX: gl.constexpr):
    """Hides what lies behind a query, and zeros in the row's last box: it has BOX - rest of them, then its tokens."""
    rest = length % BOX
    zeros = gl.where(rest > 0, BOX - rest, 0)
    last = length - rest - start
    unmoved = gl.expand_dims(gl.minimum(position - start, last - 1), 1)
    moved = gl.expand_dims(position - start + zeros, 1)
    column = gl.expand_dims(column, 0)
    return gl.where((column <= unmoved) | ((column >= last + zeros) & (column <= moved)), scores, float("-inf"))


@gluon.jit
def _softmax(scores, best, scale, MASKED: gl.constexpr):
    """The weights of these scores (the largest of all times `scale` so far is `best`), the new best, and the sum."""
    better = gl.maximum(best, gl.max(scores, 1) * scale)
    if MASKED:
        # A query may see none of the keys so far: its maximum is still -inf, and -inf from itself would be NaN.
        reach = gl.where(better == float("-inf"), 0.0, better)
    else:
        reach = better
    weights = gl.exp2(scores * scale - gl.expand_dims(reach, 1))
    return weights, better, gl.exp2(best - reach), gl.sum(weights, 1)


@gluon.jit
def _step(queries, queries_free, keys, values, weights, result, best, total, done, start, position, scale, bars,
          GROUP: gl.constexpr, MASKED: gl.constexpr, sizes: gl.constexpr):  # fmt: skip
    """The scores of the next tile of keys, and the values of the one before."""
    keys_full, keys_free, values_full, values_free, _queries_full, _queries_free = bars
    H: gl.constexpr = sizes[3]
    M: gl.constexpr = sizes[5] // 2
    KEYS: gl.constexpr = sizes[6]
    STAGES: gl.constexpr = sizes[8]
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_result, 2)
    before = (done - 1) % STAGES
    before_phase = ((done - 1) // STAGES) & 1
    stage = done % STAGES
    nothing = gl.zeros([M, KEYS], gl.float32, of_scores)
    scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    part = gl.convert_layout(weights.to(keys.dtype), of_weights)
    mbarrier.wait(values_full.index(before), before_phase)
    result = warpgroup_mma(part, values.index(before), result, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(keys_free.index(stage), count=1)
    mbarrier.arrive(queries_free, count=1, pred=start == 0)
    if MASKED:
        column = gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
        scores = gl.where(gl.expand_dims(start + column, 0) <= gl.expand_dims(position, 1), scores, float("-inf"))
    weights, best, fade, add = _softmax(scores, best, scale, MASKED)
    total = total * fade + add
    # The next tile's wait stands here, as the compiler moves no exponential over a branch and behind the wait below.
    mbarrier.wait(keys_full.index((done + 1) % STAGES), ((done + 1) // STAGES) & 1, pred=start > 0)
    result, part, weights = warpgroup_mma_wait(0, deps=[result, part, weights])
    mbarrier.arrive(values_free.index(before), count=1)
    result = result * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, of_result)), 1)
    return weights, result, best, total, done + 1


@gluon.jit
def _multiply(out, scale, buffers, bars, GROUP: gl.constexpr, sizes: gl.constexpr):
    """A warpgroup that computes 64 pairs of each tile.

    What is left of one tile when its last scores are known, and the first scores of the next, overlap like two steps.
    """
    keys_full, keys_free, values_full, values_free, queries_full, queries_free = bars
    all_queries, all_keys, all_values, notes = buffers
    N: gl.constexpr = sizes[0]
    F: gl.constexpr = sizes[2]
    H: gl.constexpr = sizes[3]
    M: gl.constexpr = sizes[5] // 2
    KEYS: gl.constexpr = sizes[6]
    BOX: gl.constexpr = sizes[7]
    STAGES: gl.constexpr = sizes[8]
    QUERY_STAGES: gl.constexpr = sizes[9]
    dtype: gl.constexpr = all_keys.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_result, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    result_rows: gl.constexpr = gl.SliceLayout(1, of_result)
    # As the accumulator lies, but with 8 columns in a thread where it has 2.
    of_memory: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + ([[0, 64]] if H == 128 else []),
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [M, H],
    )
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = reinterpret(all_keys, [STAGES, KEYS, H], flat)
    values = reinterpret(all_values, [STAGES, KEYS, H], flat)
    tiles_of_queries = reinterpret(all_queries, [QUERY_STAGES * 2, M, H], flat)

    at = gl.arange(0, H, gl.SliceLayout(0, of_memory))
    column = gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
    nothing = gl.zeros([M, KEYS], gl.float32, of_scores)
    # Before the first tile stands an empty one, whose weights are zeros.
    weights = nothing
    result = gl.zeros([M, H], gl.float32, of_result)
    total = gl.full([M], 1.0, gl.float32, score_rows)
    # Where each pair's result goes, in heads; below 0: nowhere.
    target = gl.full([M], -1, gl.int32, gl.SliceLayout(1, of_memory))
    done = 0
    found = 0
    more = True
    while more:
        place = found % QUERY_STAGES
        mbarrier.wait(queries_full.index(place), (found // QUERY_STAGES) & 1)
        first_token = _noted(notes, place, 0)
        num_queries = _noted(notes, place, 1)
        length = _noted(notes, place, 2)
        group = _noted(notes, place, 3)
        first = _noted(notes, place, 4) + GROUP * M
        tiles = _noted(notes, place, 5)
        more = tiles > 0
        queries = tiles_of_queries.index(place * 2 + GROUP)
        position = length - num_queries + (first + gl.arange(0, M, score_rows)) // F
        start = (tiles - 1) * KEYS

        # The last values of the tile of queries before, and the top tile of keys.
        stage = done % STAGES
        before = (done + STAGES - 1) % STAGES
        mbarrier.wait(values_full.index(before), ((done - 1) // STAGES) & 1, pred=found > 0)
        part = gl.convert_layout(weights.to(dtype), of_weights)
        result = warpgroup_mma(part, values.index(before), result, is_async=True)
        mbarrier.wait(keys_full.index(stage), (done // STAGES) & 1, pred=more)
        scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        result, part = warpgroup_mma_wait(1, deps=[result, part])
        mbarrier.arrive(values_free.index(before), count=1, pred=found > 0)
        result = result * gl.expand_dims(gl.convert_layout(1.0 / total, result_rows), 1)
        ready = gl.convert_layout(result.to(dtype), of_memory)
        to = gl.expand_dims(target.to(gl.int64) * H, 1) + gl.expand_dims(at, 0)
        gl.store(out + to, ready, mask=gl.expand_dims(target, 1) >= 0)

        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(keys_free.index(stage), count=1, pred=more)
        mbarrier.arrive(queries_free.index(place), count=1, pred=start == 0)
        scores = _mask_top(scores, position, start, length, column, BOX)
        best = gl.full([M], float("-inf"), gl.float32, score_rows)
        weights, best, _fade, add = _softmax(scores, best, scale, True)
        mbarrier.wait(keys_full.index((done + 1) % STAGES), ((done + 1) // STAGES) & 1, pred=start > 0)
        pair = first + gl.arange(0, M, gl.SliceLayout(1, of_memory))
        target = gl.where(pair < num_queries * F, (first_token + pair // F) * N + group * F + pair % F, -1)
        total = add
        result = gl.zeros([M, H], gl.float32, of_result)
        found += 1
        if more:
            done += 1
            # Tiles of which some queries see a part: none but for queries that straddle a tile's border.
            whole = gl.minimum((length - num_queries + first // F + 1) // KEYS, tiles - 1)
            for _j in range(whole, tiles - 1):
                start -= KEYS
                weights, result, best, total, done = _step(
                    queries, queries_free.index(place), keys, values, weights, result, best, total, done, start,
                    position, scale, bars, GROUP, True, sizes
                )  # fmt: skip
            for _j in range(whole):
                start -= KEYS
                weights, result, best, total, done = _step(
                    queries, queries_free.index(place), keys, values, weights, result, best, total, done, start,
                    position, scale, bars, GROUP, False, sizes
                )  # fmt: skip
