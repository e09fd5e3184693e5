"""Products of a weight with very few rows, with what comes before the product fused in: for one or two rows.

Such a product is the reading of its weight. A program takes a few outputs and holds its weights in registers before
it waits for the kernel in front of it (programmatic dependent launch), so that one kernel's end and the next one's
beginning overlap. In front of the product stands nothing, the residual addition with RMSNorm, or SiLU with its product.

Shapes: T tokens, I input width, O output width.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.ops.weight import Dense, Fp8Weight

# Elements of a weight's row that are held at once.
_MOST_INPUTS = 4096
# Every row more is multiplied and added up element by element, so that soon the matrix units are faster.
MOST_ROWS = 2


def matvec(x_TI: torch.Tensor, weight_OI: Dense, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`x W^T + b`."""
    out_TO = torch.empty((len(x_TI), len(weight_OI)), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, x_TI, x_TI, weight_OI, bias_O, out_TO, out_TO, 0.0, "none", pdl)
    return out_TO


def silu_matvec(gate_up_T2I: torch.Tensor, weight_OI: Dense, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`(silu(gate) * up) W^T + b`."""
    out_TO = torch.empty((len(gate_up_T2I), len(weight_OI)), dtype=gate_up_T2I.dtype, device=gate_up_T2I.device)
    _launch(gate_up_T2I, gate_up_T2I, gate_up_T2I, weight_OI, bias_O, out_TO, out_TO, 0.0, "silu", pdl)
    return out_TO


def norm_matvec(
    x_TI: torch.Tensor,
    residual_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    stream_TI: torch.Tensor,
    weight_OI: Dense,
    bias_O: torch.Tensor | None,
    *,
    pdl: bool,
) -> torch.Tensor:
    """`rms_norm(x + residual) W^T + b`; writes `x + residual` into `stream_TI`."""
    out_TO = torch.empty((len(x_TI), len(weight_OI)), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, residual_TI, norm_I, weight_OI, bias_O, out_TO, stream_TI, eps, "norm", pdl)
    return out_TO


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    weight_OI: Dense,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    stream: torch.Tensor,
    eps: float,
    before: str,
    pdl: bool,
) -> None:
    values_OI = weight_OI.values_OI if isinstance(weight_OI, Fp8Weight) else weight_OI
    outputs, inputs = values_OI.shape
    block_k, block_n, warps = _tiles(inputs)
    _matvec[(triton.cdiv(outputs, block_n),)](
        x,
        residual,
        norm,
        values_OI,
        weight_OI.scale_O if isinstance(weight_OI, Fp8Weight) else values_OI,
        values_OI if bias is None else bias,
        out,
        stream,
        eps,
        outputs,
        T=len(x),
        BLOCK_T=triton.next_power_of_2(len(x)),
        INPUTS=inputs,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BEFORE=before,
        SCALED=isinstance(weight_OI, Fp8Weight),
        BIASED=bias is not None,
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )


def _tiles(inputs: int) -> tuple[int, int, int]:
    """(inputs at once, outputs, warps) of a program: measured in docs/decisions/0083."""
    block_k = min(_MOST_INPUTS, triton.next_power_of_2(inputs))
    while block_k > 512 and inputs % block_k:
        block_k //= 2
    # More warps where a row takes several turns.
    return block_k, max(4, 8192 // block_k), 8 if block_k > 2048 or inputs > block_k else 4


@triton.jit
def _matvec(
    x,
    residual,
    norm,
    weight,
    scales,
    bias,
    out,
    stream,
    eps,
    outputs,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BEFORE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    output = program * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    row = weight + output.to(tl.int64)[:, None] * INPUTS
    here = (output < outputs)[:, None]
    first = tl.load(row + at[None, :], mask=here & (at < INPUTS)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    token = tl.arange(0, BLOCK_T)
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # of a single row, added up at the end
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        k = start + at
        inside = k < INPUTS
        weights = first
        if start > 0:
            weights = tl.load(row + k[None, :], mask=here & inside[None, :], other=0.0)
        scale = tl.zeros([BLOCK_K], tl.float32)
        if BEFORE == "norm":
            scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
        for t in range(T):
            if BEFORE == "silu":
                gate = tl.load(x + t * 2 * INPUTS + k, mask=inside, other=0.0).to(tl.float32)
                up = tl.load(x + t * 2 * INPUTS + INPUTS + k, mask=inside, other=0.0).to(tl.float32)
                values = (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty).to(tl.float32)
            elif BEFORE == "norm":
                values = tl.load(x + t * INPUTS + k, mask=inside, other=0.0).to(tl.float32)
                values += tl.load(residual + t * INPUTS + k, mask=inside, other=0.0).to(tl.float32)
                kept = values.to(out.dtype.element_ty)
                if program == 0:
                    tl.store(stream + t * INPUTS + k, kept, mask=inside)
                values = kept.to(tl.float32)
                squares += tl.where(token == t, tl.sum(values * values, 0), 0.0)
                values *= scale
            else:
                values = tl.load(x + t * INPUTS + k, mask=inside, other=0.0).to(tl.float32)
            if T == 1:
                products += weights.to(tl.float32) * values[None, :]
            else:
                part = tl.sum(weights.to(tl.float32) * values[None, :], 1)
                sums += tl.where((token == t)[None, :], part[:, None], 0.0)
    if T == 1:
        sums = tl.sum(products, 1)[:, None]
    if BEFORE == "norm":
        sums *= tl.rsqrt(squares / INPUTS + eps)[None, :]
    if SCALED:
        sums *= tl.load(scales + output, mask=output < outputs, other=0.0)[:, None]
    if BIASED:
        sums += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    place = out + token[None, :] * outputs + output[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=here & (token < T)[None, :])
