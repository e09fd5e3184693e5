"""The first kernel of a recorded step, and the last: what the host sent becomes what the step's kernels read, and back.

The first looks up tokens that were drawn on the device and that the host has not seen, computes the rotary angles, and
spreads the block tables from their packed width to a fixed one. In a step that goes on from the one before, nothing was
sent: it counts positions, lengths and the noise's states itself, and reads a row's new block, where it gets one, in the
host's memory. The last writes the tokens there. Shapes as in `octavo.ops`; r/2 angles a head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TABLE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Arrived:
    """A step's arrays on the device, R rows with a token each; for padding `slots_R` is -1, `seq_lens_R` 0."""

    control_2: torch.Tensor  # turn of the step that ran last, and whether a step was sent since
    blocks_TR: torch.Tensor  # of T turns, in the host's memory: those that rows get, where they get one
    states_S: torch.Tensor
    given_R: torch.Tensor  # token ids; below 0: ~(index into what the step before drew)
    positions_R: torch.Tensor
    slots_R: torch.Tensor
    seq_lens_R: torch.Tensor
    sample_of_row_R: torch.Tensor
    width_1: torch.Tensor  # entries a row in `packed`
    packed: torch.Tensor


def prepare(
    arrived: Arrived,
    drawn_S: torch.Tensor,
    block_size: int,
    inv_freq: torch.Tensor,
    magnitude: float,
    token_ids_R: torch.Tensor,
    cos_Rr: torch.Tensor,
    sin_Rr: torch.Tensor,
    tables_RM: torch.Tensor,
) -> None:
    """Writes the last four, and in a step that goes on `positions_R`, `slots_R`, `seq_lens_R` and `states_S`."""
    R, M = tables_RM.shape
    half = cos_Rr.shape[1]
    _prepare[(R, triton.cdiv(M, _TABLE_BLOCK))](
        arrived.control_2,
        arrived.blocks_TR,
        arrived.blocks_TR.stride(0),
        arrived.states_S,
        arrived.given_R,
        arrived.positions_R,
        arrived.slots_R,
        arrived.seq_lens_R,
        arrived.sample_of_row_R,
        arrived.width_1,
        arrived.packed,
        drawn_S,
        inv_freq,
        magnitude,
        token_ids_R,
        cos_Rr,
        sin_Rr,
        tables_RM,
        M,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK=_TABLE_BLOCK,
        BLOCK_SIZE=block_size,
        TURNS=len(arrived.blocks_TR),
        num_warps=4,
    )


def publish(drawn_S: torch.Tensor, control_2: torch.Tensor, out_TS: torch.Tensor) -> None:
    """Ends a step: its tokens go to its turn of `out_TS`, in the host's memory, and `control_2` says that it ran."""
    S = len(drawn_S)
    _publish[(1,)](
        drawn_S, control_2, out_TS, out_TS.stride(0), S, BLOCK=triton.next_power_of_2(S), TURNS=len(out_TS), num_warps=4
    )


def spread(packed: torch.Tensor, width_1: torch.Tensor, tables_RM: torch.Tensor) -> None:
    """Writes `packed`, which holds `width_1` entries a row, to the beginnings of the rows of `tables_RM`."""
    R, M = tables_RM.shape
    _spread[(R, triton.cdiv(M, _TABLE_BLOCK))](packed, width_1, tables_RM, M, BLOCK=_TABLE_BLOCK, num_warps=4)


def look_up(given_T: torch.Tensor, drawn_S: torch.Tensor) -> torch.Tensor:
    """`given_T` with entries below 0 replaced by the drawn tokens that they stand for; where none could be drawn, by
    token 0, whose row is of no use to anybody."""
    out_T = torch.empty_like(given_T)
    _look_up[(triton.cdiv(len(given_T), 1024),)](given_T, drawn_S, out_T, len(given_T), BLOCK=1024)
    return out_T


@triton.jit
def _prepare(
    control,
    blocks,
    blocks_stride,
    states,
    given,
    positions,
    slots,
    seq_lens,
    sample_of_row,
    width,
    packed,
    drawn,
    inv_freq,
    magnitude,
    token_ids,
    cos,
    sin,
    tables,
    table_stride,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TURNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) == 0
    table = tables + row * table_stride
    position = tl.load(positions + row)
    if tl.load(control + 1) != 0:
        _spread_row(packed, width, table, row, BLOCK)
        if first:
            token = tl.load(given + row)
            token = tl.where(token < 0, tl.load(drawn + (-1 - token), mask=token < 0, other=0), token)
            tl.store(token_ids + row, tl.maximum(token, 0))
    else:
        length = tl.load(seq_lens + row)
        if first & (length > 0):
            turn = (tl.load(control) + 1) % TURNS
            position += 1
            place = position // BLOCK_SIZE
            opens = position % BLOCK_SIZE == 0
            block = tl.load(tl.where(opens, blocks + turn * blocks_stride + row, table + place))
            tl.store(table + place, block, mask=opens)
            tl.store(slots + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
            tl.store(positions + row, position)
            tl.store(seq_lens + row, length + 1)
            tl.store(states + row, tl.load(states + row) + 1)
            token = tl.load(drawn + tl.load(sample_of_row + row))
            tl.store(token_ids + row, tl.maximum(token, 0))
    if first:
        at = tl.arange(0, BLOCK_HALF)
        angle = position.to(tl.float32) * tl.load(inv_freq + at, mask=at < HALF, other=0.0)
        tl.store(cos + row * HALF + at, tl.cos(angle) * magnitude, mask=at < HALF)
        tl.store(sin + row * HALF + at, tl.sin(angle) * magnitude, mask=at < HALF)


@triton.jit
def _spread(packed, width, tables, table_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _spread_row(packed, width, tables + row * table_stride, row, BLOCK)


@triton.jit
def _spread_row(packed, width, table, row, BLOCK: tl.constexpr):
    entries = tl.load(width)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(packed + row * entries + column, mask=column < entries)
    tl.store(table + column, block, mask=column < entries)


@triton.jit
def _publish(drawn, control, out, out_stride, count, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    turn, fresh = tl.load(control), tl.load(control + 1)
    turn = tl.where(fresh != 0, turn, (turn + 1) % TURNS)
    at = tl.arange(0, BLOCK)
    tl.store(out + turn * out_stride + at, tl.load(drawn + at, mask=at < count), mask=at < count)
    tl.debug_barrier()  # everybody has read what is written now
    tl.store(control, turn)
    tl.store(control + 1, 0)


@triton.jit
def _look_up(given, drawn, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(given + at, mask=at < count, other=0)
    token = tl.where(token < 0, tl.load(drawn + (-1 - token), mask=(token < 0) & (at < count), other=0), token)
    tl.store(out + at, tl.maximum(token, 0), mask=at < count)
