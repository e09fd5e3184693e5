"""The product of a small weight with 3 to 16 rows: for decoding small batches of small models.

Larger products are cuBLAS'; in these it leaves most of the multiprocessors idle. A program takes a few outputs and all
inputs, each warp a slice of these, with the first weights on their way before the kernel in front has ended.

Shapes: T tokens, I input width, O output width.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.ops.triton.tiles import dot_precision
from octavo.ops.weight import Dense, Fp8Weight

MOST_ROWS = 16
_MOST_WEIGHTS = 2**22
_WARPS, _INPUTS, _OUTPUTS = 4, 512, 16  # of a program


def suits(rows: int, weight_OI: Dense) -> bool:
    """Whether this is the faster way, as measured in docs/decisions/0083; of fp8 it reads half as much as others."""
    if rows > MOST_ROWS:
        return False
    if isinstance(weight_OI, Fp8Weight):
        return weight_OI.values_OI.shape[1] % _INPUTS == 0
    return weight_OI.numel() <= _MOST_WEIGHTS and weight_OI.shape[1] % _INPUTS == 0


def matmul(x_TI: torch.Tensor, weight_OI: Dense, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`x W^T + b`."""
    values_OI = weight_OI.values_OI if isinstance(weight_OI, Fp8Weight) else weight_OI
    outputs, inputs = values_OI.shape
    out_TO = torch.empty((len(x_TI), outputs), dtype=x_TI.dtype, device=x_TI.device)
    _matmul[(triton.cdiv(outputs, _OUTPUTS),)](
        x_TI,
        values_OI,
        weight_OI.scale_O if isinstance(weight_OI, Fp8Weight) else values_OI,
        values_OI if bias_O is None else bias_O,
        out_TO,
        len(x_TI),
        outputs,
        INPUTS=inputs,
        BLOCK_T=MOST_ROWS,
        BLOCK_N=_OUTPUTS,
        SLICES=_WARPS,
        BLOCK_K=_INPUTS // _WARPS,
        SCALED=isinstance(weight_OI, Fp8Weight),
        BIASED=bias_O is not None,
        PRECISION=dot_precision(x_TI.dtype),
        PDL=pdl,
        num_warps=_WARPS,
        num_stages=3,
        launch_pdl=pdl,
    )
    return out_TO


@triton.jit
def _matmul(
    x,
    weight,
    scales,
    bias,
    out,
    tokens,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    at = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    row = weight + output.to(tl.int64)[None, :, None] * INPUTS
    line = x + token[None, :, None] * INPUTS
    here, given = (output < outputs)[None, :, None], (token < tokens)[None, :, None]
    first = tl.load(row + at, mask=here, other=0.0)
    if PDL:
        gdc_wait()
    values = tl.load(line + at, mask=given, other=0.0)
    sums = tl.dot(values, tl.trans(first.to(values.dtype), (0, 2, 1)), input_precision=PRECISION)
    for start in range(SLICES * BLOCK_K, INPUTS, SLICES * BLOCK_K):
        weights = tl.load(row + start + at, mask=here, other=0.0)
        values = tl.load(line + start + at, mask=given, other=0.0)
        sums = tl.dot(values, tl.trans(weights.to(values.dtype), (0, 2, 1)), sums, input_precision=PRECISION)
    result = tl.sum(sums, 0)
    if SCALED:
        result *= tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
    if BIASED:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = out + token[:, None] * outputs + output[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (output < outputs)[None, :])
