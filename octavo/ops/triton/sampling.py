"""Drawing tokens on the device: temperature, top_k, top_p and min_p, without a sort or anything that is waited for.

The token is the argmax of logits over temperature plus noise among what the filters leave; ties go to the lowest id.
The filters are those of `octavo.runner.sampler`: thresholds, in this order. A nucleus' edge is never looked for. The
best of what the other filters leave is drawn if the tokens strictly above its logit hold less than top_p. Else
whatever is not above it is outside, and the best of those above is asked for next: at most 1 / top_p draws in the
mean. So that a threshold need not be held against a whole row, a first kernel notes the largest logit of each group of
tokens, and a second, a program a row, reads the groups that reach it.

    logits    [ group | group | ... chunk | group | group | ... chunk | ... ]
    peaks       4.1     9.7           2.0   7.5     0.3
    listed      1  3                        the groups that reach 7.5, by number

A score takes two logarithms and two divisions, and a chunk has one winner. So it bounds its scores first: -log1p(-v)
is v or more, hence noise is -log(v) or less, which is one instruction of the hardware. The piece of the largest bound
is scored, and usually no other's bound reaches that score.

All sums have an order that depends on the row alone. What a row does not ask for is not done for it: one without
filters has its token from the first kernel. Shapes: S samples, V vocabulary, C chunks and G groups of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from octavo.batch import NO_TOKEN, NOT_FINITE
from octavo.ops.triton.noise import fold, gumbel, hash32, key_of
from octavo.ops.triton.tiles import LOG2_E, NO_GPU, capability

# Below it, logits over the temperature could overflow: such draws are left to the sampler that subtracts a maximum.
MIN_TEMPERATURE = 1e-4
_CHUNK = 4096
_GROUP = 64
# Tokens that are scored together: as many as a warp has threads, so that a warp asks no other which is the best.
_PIECE = 32
# More than the roundings of a score and of its bound add up to, in base 2: in any case, and for each unit of the score.
_SLACK, _SLACK_OF_SCORE = tl.constexpr(1e-4), tl.constexpr(2e-6)
_LOG2_E = tl.constexpr(LOG2_E)
_NO_TOKEN, _NOT_FINITE = tl.constexpr(NO_TOKEN), tl.constexpr(NOT_FINITE)
# Groups that a row's program holds at once.
_TILE = 64
# Bits of a logit in fp32 that are the same in all logits of a type.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


class Asked(NamedTuple):
    """What samples ask for. A filter is off at top_k 0, top_p 1 and min_p 0, and all are where the temperature is 0."""

    states_S: torch.Tensor  # of the noise: int64 with the same bits
    temperature_S: torch.Tensor  # fp32
    top_k_S: torch.Tensor  # int32
    top_p_S: torch.Tensor  # fp32
    min_p_S: torch.Tensor  # fp32


def draw(logits_SV: torch.Tensor, asked: Asked, num_tokens: int, out_S: torch.Tensor) -> None:
    """Writes a token for each sample into `out_S` (int32), from the first `num_tokens` of the vocabulary.

    `NO_TOKEN` where all logits are -inf, `NOT_FINITE` where one is NaN or +inf.
    """
    S, V = logits_SV.shape
    chunks, groups = triton.cdiv(num_tokens, _CHUNK), triton.cdiv(num_tokens, _GROUP)
    of_chunk_4SC = torch.empty((4, S, chunks), dtype=torch.float32, device=logits_SV.device)
    best_SC, token_SC, peak_SC, mass_SC = of_chunk_4SC.unbind()
    of_chunks = (best_SC, token_SC.view(torch.int32), peak_SC, mass_SC)
    peaks_SG = torch.empty((S, groups), dtype=logits_SV.dtype, device=logits_SV.device)
    listed_SG = torch.empty((S, groups), dtype=torch.int32, device=logits_SV.device)
    _look_at_chunk[(chunks, S)](
        logits_SV,
        *asked,
        *of_chunks,
        peaks_SG,
        num_tokens,
        V,
        groups,
        CHUNK=_CHUNK,
        GROUP=_GROUP,
        PIECE=_PIECE,
        CUDA=capability(logits_SV.device) != NO_GPU,
        num_warps=4,
    )
    _draw_from_row[(S,)](
        logits_SV,
        *asked,
        *of_chunks,
        peaks_SG,
        listed_SG,
        out_S,
        num_tokens,
        V,
        groups,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        GROUPS=triton.next_power_of_2(groups),
        GROUP=_GROUP,
        TILE=_TILE,
        UNUSED=_UNUSED_BITS[logits_SV.dtype],
        num_warps=8,
        maxnreg=128,  # so that two programs fit a multiprocessor
    )


@triton.jit
def _look_at_chunk(
    logits,
    states,
    temperature,
    top_k,
    top_p,
    min_p,
    best,
    token_of_best,
    peak,
    mass,
    peaks,
    num_tokens,
    stride,
    groups,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    CUDA: tl.constexpr,
):
    """The best of a chunk; for a row with filters the groups' and the chunk's largest logit,
    and for a nucleus among all tokens the chunk's mass relative to that."""
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    place = sample * tl.num_programs(0) + chunk
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = logits + sample * stride
    value = tl.load(row + token, mask=token < num_tokens, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + sample)
    # With a threshold that is known before the first draw, what is drawn from everything is of no use.
    everything = False
    if heat > 0:
        k = tl.load(top_k + sample)
        limited = (k > 0) & (k < num_tokens)
        nucleus = tl.load(top_p + sample) < 1
        floored = tl.load(min_p + sample) > 0
        everything = (limited | floored) == 0
        if limited | nucleus | floored:
            of_groups = tl.max(value, 1)
            tl.store(peaks + sample * groups + group, of_groups.to(peaks.dtype.element_ty), mask=group < groups)
            largest = tl.max(of_groups, 0)
            tl.store(peak + place, largest)
            if nucleus & (limited == 0):
                origin = tl.where(largest == float("-inf"), 0.0, largest)
                tl.store(mass + place, tl.sum(tl.sum(tl.exp((value - origin) / heat), 1), 0))
    if everything:
        low, high = key_of(states, sample)
        # A token's number and its parts are folded alike.
        z = (fold((group * GROUP).to(tl.uint32)) ^ low)[:, None] ^ tl.arange(0, GROUP)[None, :].to(tl.uint32)
        # Divided by more than 1e30, all logits are nothing; the factor would be too, and denormal.
        to_scores = _LOG2_E / tl.minimum(heat, 1e30)
        below = _log2(hash32(z, high).to(tl.float32), CUDA) + value * -to_scores
        bound = -tl.min(tl.reshape(below, (CHUNK // PIECE, PIECE)), 1)
        top, first = _best_within(bound, row, chunk * CHUNK, num_tokens, heat, low, high, CHUNK // PIECE, PIECE)
    else:
        top = tl.max(tl.max(value, 1), 0)
        first = tl.min(tl.min(tl.where(value == top, token, 0x7FFFFFFF), 1), 0)
    infinite = tl.max(tl.max((value < float("inf")).to(tl.int32) ^ 1, 1), 0)  # or not a number
    tl.store(best + place, tl.where(infinite > 0, float("nan"), top))
    tl.store(token_of_best + place, first)


@triton.jit
def _best_within(bound, row, start, num_tokens, heat, low, high, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """The best score among pieces whose tokens begin at `start`, and the lowest token that has it. `bound` is above the
    scores of a piece, in base 2 and less 32: pieces are scored in its order until what is left is below the best."""
    piece = tl.arange(0, PIECES)
    # Bounds as integers whose last bits are the piece's number, the lowest above others.
    key = (_key(bound, 0) | (PIECES - 1)) - piece
    key = tl.where(bound == bound, key, -0x80000000)  # no logit of such a piece is a number
    nearest = tl.max(key, 0)
    top = tl.full((), float("-inf"), tl.float32)
    first = tl.full((), 0x7FFFFFFF, tl.int32)
    going = True
    while going:
        chosen = ~nearest & (PIECES - 1)
        token = start + chosen * PIECE + tl.arange(0, PIECE)
        value = tl.load(row + token, mask=token < num_tokens, other=float("-inf")).to(tl.float32)
        score = tl.div_rn(value, heat) + gumbel(token.to(tl.uint32), low, high)
        top_here = tl.max(score, 0)
        here = tl.min(tl.where(score == top_here, token, 0x7FFFFFFF), 0)
        first = tl.where(top_here > top, here, tl.where(top_here == top, tl.minimum(here, first), first))
        top = tl.where(top_here > top, top_here, top)
        key = tl.where(piece == chosen, -0x80000000, key)
        nearest = tl.max(key, 0)
        least = top * _LOG2_E - 32
        least = tl.minimum(least * (1 - _SLACK_OF_SCORE), least * (1 + _SLACK_OF_SCORE)) - _SLACK
        # Without the bits that the pieces' keys gave away; and above that of -inf, which cannot win.
        going = (nearest >= (_key(least, 0) & -PIECES)) & (nearest > -0x7F800001)
    return top, first


@triton.jit
def _log2(x, CUDA: tl.constexpr):
    """What the hardware has, within 2^-22 of it; `tl.log2` is closer, and takes 28 instructions instead of one."""
    if CUDA:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


# Where `groups` is known to be even, a thread loads several peaks side by side, but stores list entries one by one, and
# moving everything from one layout to the other takes 45 more registers.
@triton.jit(do_not_specialize=["groups"])
def _draw_from_row(
    logits,
    states,
    temperature,
    top_k,
    top_p,
    min_p,
    best,
    token_of_best,
    peak,
    mass,
    peaks,
    listed,
    out,
    num_tokens,
    stride,
    groups,
    chunks,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    UNUSED: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + sample)
    k = tl.load(top_k + sample)
    p = tl.load(top_p + sample)
    least = tl.load(min_p + sample)
    chunk = tl.arange(0, CHUNKS)
    place = sample * chunks + chunk
    there = chunk < chunks
    score = tl.load(best + place, mask=there, other=float("-inf"))
    token = tl.load(token_of_best + place, mask=there, other=0x7FFFFFFF)
    token = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    broken = tl.max((score != score).to(tl.int32), 0) > 0
    empty = tl.max(score, 0) == float("-inf")
    heat = tl.where(broken | empty, 0.0, heat)  # there is nothing to filter

    limited = (heat > 0) & (k > 0) & (k < num_tokens)
    nucleus = (heat > 0) & (p < 1)
    floored = (heat > 0) & (least > 0)
    if limited | nucleus | floored:
        of_chunk = tl.load(peak + place, mask=there, other=float("-inf"))
        largest = tl.max(of_chunk, 0)
        group = tl.arange(0, GROUPS)
        exists = group < groups
        of_group = tl.load(peaks + sample * groups + group, mask=exists, other=float("-inf")).to(tl.float32)
        scale = (largest, heat)
        reach = _scaled(of_group, scale)
        row = (logits + sample * stride, num_tokens, listed + sample * groups)

        # What is drawn from has `edge` or more, and more than `above`; it will do with less mass above than `limit`.
        edge = tl.where(floored, tl.log(tl.where(floored, least, 1.0)), float("-inf"))
        above = tl.full((), float("-inf"), tl.float32)
        limit = tl.full((), float("inf"), tl.float32)
        count = 0
        if limited:
            count, kth = _top_k(row, scale, of_group, k, groups, GROUPS, GROUP, TILE, UNUSED)
            if nucleus:
                limit = p * _mass(row, scale, count, kth, above, GROUP, TILE)
            edge = tl.maximum(edge, kth)
        else:
            if floored:
                count = _list(exists & (reach >= edge), group, row)
            if nucleus:
                of_chunk = tl.where(there, of_chunk - largest, float("-inf"))
                limit = p * tl.sum(tl.load(mass + place, mask=there, other=0.0) * tl.exp(of_chunk / heat), 0)

        low, high = key_of(states, sample)
        unknown = limited | floored
        going = heat > 0
        while going:
            if unknown:
                found = _best(row, scale, count, edge, above, low, high, GROUP, TILE)
                token = tl.where(found < num_tokens, found, token)
            going = nucleus
            if nucleus:
                above = _scaled(tl.load(logits + sample * stride + token).to(tl.float32), scale)
                count = _list(exists & (reach > above), group, row)
                going = (_mass(row, scale, count, edge, above, GROUP, TILE) >= limit) & (count > 0)
            unknown = going
    tl.store(out + sample, tl.where(broken, _NOT_FINITE, tl.where(empty, _NO_TOKEN, token)))


@triton.jit
def _top_k(
    row,
    scale,
    of_group,
    k,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    UNUSED: tl.constexpr,
):
    """Lists groups that reach the k-th largest logit; how many these are, and that logit, scaled."""
    largest, _ = scale
    most = _key(largest, UNUSED)
    # As many tokens as groups reach a group's peak, so the k-th largest peak bounds the k-th largest logit.
    group = tl.arange(0, GROUPS)
    least = tl.min(tl.where(group < groups, of_group, float("inf")), 0)
    least = _key(tl.where(k <= groups, least, float("-inf")), UNUSED)
    bound = _kth_largest(_key(of_group, UNUSED), k, least, most)
    reached = _scaled(of_group, scale) >= _scaled(_value(bound, UNUSED), scale)
    count = _list(reached & (group < groups), group, row)
    return count, _scaled(_value(_kth_listed(row, count, k, bound, most, GROUP, TILE, UNUSED), UNUSED), scale)


@triton.jit
def _scaled(value, scale):
    """Rounded as by torch: values that differ may become equal, and then stay or go together."""
    largest, heat = scale
    return tl.div_rn(value - largest, heat)


@triton.jit
def _key(value, UNUSED: tl.constexpr):
    """Integers in the order of the values."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED


@triton.jit
def _value(key, UNUSED: tl.constexpr):
    bits = (key << UNUSED) | tl.where(key < 0, (1 << UNUSED) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(least, most):
    """Rounded up, without overflow."""
    return (least | most) - ((least ^ most) >> 1)


@triton.jit
def _kth_largest(key, k, least, most):
    """Of keys of which k are at or above `least` and none is above `most`."""
    while least < most:
        middle = _middle(least, most)
        enough = tl.sum((key >= middle).to(tl.int32)) >= k
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle - 1)
    return least


@triton.jit
def _list(chosen, group, row):
    """Writes the chosen groups down in their order, and returns how many these are."""
    _, _, listed = row
    count = tl.cumsum(chosen.to(tl.int32), 0)
    tl.debug_barrier()  # the list before may still be read
    tl.store(listed + count - 1, group, mask=chosen)
    tl.debug_barrier()
    return tl.max(count, 0)


@triton.jit
def _tile(row, start, count, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Tokens and logits of the listed groups from `start` on."""
    logits, num_tokens, listed = row
    place = start + tl.arange(0, TILE)
    there = place < count
    group = tl.load(listed + place, mask=there, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = there[:, None] & (token < num_tokens)
    return token, tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _kth_listed(row, count, k, least, most, GROUP: tl.constexpr, TILE: tl.constexpr, UNUSED: tl.constexpr):
    """As `_kth_largest`, of the logits in the listed groups."""
    if count <= TILE:
        _, value = _tile(row, 0, count, GROUP, TILE)
        least = _kth_largest(_key(value, UNUSED), k, least, most)
    else:
        while least < most:
            middle = _middle(least, most)
            found = tl.zeros((TILE, GROUP), tl.int32)
            for start in range(0, count, TILE):
                _, value = _tile(row, start, count, GROUP, TILE)
                found += (_key(value, UNUSED) >= middle).to(tl.int32)
            enough = tl.sum(found) >= k
            least = tl.where(enough, middle, least)
            most = tl.where(enough, most, middle - 1)
    return least


@triton.jit
def _mass(row, scale, count, edge, above, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Of the listed groups' tokens from `edge` on and over `above`, relative to the likeliest token."""
    held = tl.zeros((TILE, GROUP), tl.float32)
    for start in range(0, count, TILE):
        _, value = _tile(row, start, count, GROUP, TILE)
        scaled = _scaled(value, scale)
        held += tl.where((scaled >= edge) & (scaled > above), tl.exp(scaled), 0.0)
    return tl.sum(held)


@triton.jit
def _best(row, scale, count, edge, above, low, high, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The token drawn from the same; a number that is no token's if there are none."""
    best = tl.full((TILE, GROUP), float("-inf"), tl.float32)
    token_of_best = tl.full((TILE, GROUP), 0x7FFFFFFF, tl.int32)
    for start in range(0, count, TILE):
        token, value = _tile(row, start, count, GROUP, TILE)
        scaled = _scaled(value, scale)
        score = scaled + gumbel(token.to(tl.uint32), low, high)
        better = (scaled >= edge) & (scaled > above) & (score > best)
        best = tl.where(better, score, best)
        token_of_best = tl.where(better, token, token_of_best)
    return tl.min(tl.where(best == tl.max(best), token_of_best, 0x7FFFFFFF))
