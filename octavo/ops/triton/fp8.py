"""The product of a weight in e4m3 with many rows: these become e4m3 too, with a scale a row, and cuBLAS or CUTLASS,
which torch brings, multiplies both at twice the rate of 16 bits.

Shapes: T tokens, I input width, O output width.
"""

import torch
import triton
import triton.language as tl

from octavo.ops.triton.tiles import capability
from octavo.ops.weight import Fp8Weight

# Rows below which products are bound by reading weights, so that 16-bit activations cost nothing.
_LEAST_ROWS = 64


def suits(x_TI: torch.Tensor, weight_OI: Fp8Weight) -> bool:
    """Whether torch has such a product: in bf16, of widths that are multiples of 16."""
    outputs, inputs = weight_OI.values_OI.shape
    return (
        len(x_TI) >= _LEAST_ROWS
        and capability(x_TI.device) >= (8, 9)
        and x_TI.dtype == torch.bfloat16
        and inputs % 16 == outputs % 16 == 0
    )


def linear(x_TI: torch.Tensor, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b`, x rounded to e4m3 with a scale for each row."""
    values_TI, scale_T1 = quantize_rows(x_TI)
    out_TO = torch._scaled_mm(
        values_TI,
        weight_OI.values_OI.t(),
        scale_a=scale_T1,
        scale_b=weight_OI.scale_O[None, :],
        out_dtype=x_TI.dtype,
        use_fast_accum=True,
    )
    return out_TO if bias_O is None else out_TO.add_(bias_O)


def quantize_rows(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in e4m3, [T, 1] scales in fp32), whose product is x; each row's largest becomes 448."""
    T, inputs = x_TI.shape
    values_TI = torch.empty((T, inputs), dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale_T1 = torch.empty((T, 1), dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(inputs)
    _quantize_rows[(T,)](x_TI, values_TI, scale_T1, INPUTS=inputs, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return values_TI, scale_T1


@triton.jit
def _quantize_rows(x, values, scales, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    given = tl.load(x + row * INPUTS + at, mask=at < INPUTS, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(given), 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(values + row * INPUTS + at, (given / scale).to(values.dtype.element_ty), mask=at < INPUTS)
