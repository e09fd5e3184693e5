"""The first kernel of a recorded step: from the packed arrays that the host sent to what the step's kernels read.

It looks up tokens that were drawn on the device and that the host has not seen, computes the rotary angles, and
spreads the block tables from their packed width to a fixed one. A step that continues the one before brings no tables:
a row's newest block is known from its slot. Shapes as in `octavo.ops`; r/2 angles a head.
"""

import torch
import triton
import triton.language as tl

_TABLE_BLOCK = 1024


def prepare(
    given_R: torch.Tensor,
    drawn_S: torch.Tensor,
    positions_R: torch.Tensor,
    slots_R: torch.Tensor,
    block_size: int,
    inv_freq: torch.Tensor,
    magnitude: float,
    width_1: torch.Tensor,
    packed: torch.Tensor,
    token_ids_R: torch.Tensor,
    cos_Rr: torch.Tensor,
    sin_Rr: torch.Tensor,
    tables_RM: torch.Tensor,
) -> None:
    """Writes the last four. `given_R` below 0 is ~(index into `drawn_S`); `packed` holds `width_1` entries a row, which
    may be none. `slots_R` is -1 for rows that are padding."""
    R, M = tables_RM.shape
    half = cos_Rr.shape[1]
    _prepare[(R, triton.cdiv(M, _TABLE_BLOCK))](
        given_R,
        drawn_S,
        positions_R,
        slots_R,
        inv_freq,
        magnitude,
        width_1,
        packed,
        token_ids_R,
        cos_Rr,
        sin_Rr,
        tables_RM,
        M,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK=_TABLE_BLOCK,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )


def look_up(given_T: torch.Tensor, drawn_S: torch.Tensor) -> torch.Tensor:
    """`given_T` with entries below 0 replaced by the drawn tokens that they stand for."""
    out_T = torch.empty_like(given_T)
    _look_up[(triton.cdiv(len(given_T), 1024),)](given_T, drawn_S, out_T, len(given_T), BLOCK=1024)
    return out_T


@triton.jit
def _prepare(
    given,
    drawn,
    positions,
    slots,
    inv_freq,
    magnitude,
    width,
    packed,
    token_ids,
    cos,
    sin,
    tables,
    table_stride,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    if tl.program_id(1) == 0:
        token = tl.load(given + row)
        token = tl.where(token < 0, tl.load(drawn + (-1 - token), mask=token < 0, other=0), token)
        tl.store(token_ids + row, token)
        at = tl.arange(0, BLOCK_HALF)
        angle = position.to(tl.float32) * tl.load(inv_freq + at, mask=at < HALF, other=0.0)
        tl.store(cos + row * HALF + at, tl.cos(angle) * magnitude, mask=at < HALF)
        tl.store(sin + row * HALF + at, tl.sin(angle) * magnitude, mask=at < HALF)
    entries = tl.load(width)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(packed + row * entries + column, mask=column < entries, other=0)
    slot = tl.load(slots + row)
    newest = (column == position // BLOCK_SIZE) & (slot >= 0)
    block = tl.where(newest, slot // BLOCK_SIZE, block)
    tl.store(tables + row * table_stride + column, block, mask=(column < entries) | newest)


@triton.jit
def _look_up(given, drawn, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(given + at, mask=at < count, other=0)
    token = tl.where(token < 0, tl.load(drawn + (-1 - token), mask=(token < 0) & (at < count), other=0), token)
    tl.store(out + at, token, mask=at < count)
