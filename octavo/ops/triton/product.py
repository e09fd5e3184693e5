"""The product of a weight, of 16 or 32 bits or in e4m3, with any number of rows, summed in one order for all numbers.

A program takes a tile of rows and outputs and walks over the inputs from first to last, with nothing split: a row's
sums take the same products in the same order whatever other rows there are. What is read in e4m3 is widened in
registers. Shapes: T tokens, I input width, O output width.
"""

import torch
import triton
import triton.language as tl

from octavo.ops.triton.tiles import dot_precision
from octavo.ops.weight import Dense, Fp8Weight

_GROUP = 8  # tiles of rows that are computed next to each other, to read the same weights out of the L2 cache


def product(x_TI: torch.Tensor, weight_OI: Dense, bias_O: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b`."""
    values_OI = weight_OI.values_OI if isinstance(weight_OI, Fp8Weight) else weight_OI
    T, (outputs, inputs) = len(x_TI), values_OI.shape
    out_TO = torch.empty((T, outputs), dtype=x_TI.dtype, device=x_TI.device)
    block_t, block_n, block_k, warps, stages = _tile(T, x_TI.dtype)
    _product[(triton.cdiv(T, block_t) * triton.cdiv(outputs, block_n),)](
        x_TI,
        values_OI,
        weight_OI.scale_O if isinstance(weight_OI, Fp8Weight) else values_OI,
        values_OI if bias_O is None else bias_O,
        out_TO,
        T,
        outputs,
        x_TI.stride(0),
        INPUTS=inputs,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=_GROUP,
        SCALED=isinstance(weight_OI, Fp8Weight),
        BIASED=bias_O is not None,
        PRECISION=dot_precision(x_TI.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    return out_TO


def _tile(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, outputs, inputs, warps, stages): at least 64 rows, so that the matrix units' instruction is the same."""
    if dtype == torch.float32:
        return 64, 32, 32, 4, 2
    if rows <= 64:
        return 64, 16, 128, 4, 4
    if rows <= 256:
        return 64, 64, 128, 4, 3
    return 128, 128, 64, 8, 3


@triton.jit
def _product(
    x,
    weight,
    scales,
    bias,
    out,
    tokens,
    outputs,
    x_stride,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t, tiles_n = tl.cdiv(tokens, BLOCK_T), tl.cdiv(outputs, BLOCK_N)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    wide = tl.minimum(tiles_t - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    token = ((first + within % wide) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    output = (within // wide * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at = tl.arange(0, BLOCK_K)
    given, here = token < tokens, output < outputs
    line = x + token[:, None] * x_stride + at[None, :]
    row = weight + output[:, None] * INPUTS + at[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        inside = (at < INPUTS - start)[None, :] | (INPUTS % BLOCK_K == 0)
        values = tl.load(line + start, mask=given[:, None] & inside, other=0.0)
        weights = tl.load(row + start, mask=here[:, None] & inside, other=0.0).to(values.dtype)
        sums = tl.dot(values, tl.trans(weights), sums, input_precision=PRECISION)
    if SCALED:
        sums *= tl.load(scales + output, mask=here, other=0.0)[None, :]
    if BIASED:
        sums += tl.load(bias + output, mask=here, other=0.0).to(tl.float32)[None, :]
    place = out + token[:, None] * outputs + output[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=given[:, None] & here[None, :])
