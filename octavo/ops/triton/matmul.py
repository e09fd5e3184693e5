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

MOST_ROWS = 16
_MOST_WEIGHTS = 2**22
_WARPS, _INPUTS, _OUTPUTS = 4, 512, 16  # of a program


def suits(rows: int, weight_OI: torch.Tensor) -> bool:
    """Whether this is the faster way, as measured in docs/decisions/0083."""
    return rows <= MOST_ROWS and weight_OI.numel() <= _MOST_WEIGHTS and weight_OI.shape[1] % _INPUTS == 0


def matmul(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`x W^T + b`."""
    outputs, inputs = weight_OI.shape
    out_TO = torch.empty((len(x_TI), outputs), dtype=x_TI.dtype, device=x_TI.device)
    _matmul[(triton.cdiv(outputs, _OUTPUTS),)](
        x_TI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        out_TO,
        len(x_TI),
        outputs,
        INPUTS=inputs,
        BLOCK_T=MOST_ROWS,
        BLOCK_N=_OUTPUTS,
        SLICES=_WARPS,
        BLOCK_K=_INPUTS // _WARPS,
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
    bias,
    out,
    tokens,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    sums = tl.dot(values, tl.trans(first, (0, 2, 1)), input_precision=PRECISION)
    for start in range(SLICES * BLOCK_K, INPUTS, SLICES * BLOCK_K):
        weights = tl.load(row + start + at, mask=here, other=0.0)
        values = tl.load(line + start + at, mask=given, other=0.0)
        sums = tl.dot(values, tl.trans(weights, (0, 2, 1)), sums, input_precision=PRECISION)
    result = tl.sum(sums, 0)
    if BIASED:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = out + token[:, None] * outputs + output[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (output < outputs)[None, :])
