"""Products of small weights with 3 to 16 rows, and what stands around them: for decoding small batches of small models.

Larger products are cuBLAS'; in these it leaves most of the multiprocessors idle. A program takes a few outputs and all
inputs, each warp a slice of these; the first weights are on their way, and the rest on theirs into the L2 cache, before
the kernel in front has ended.

A norm in front costs a program only a multiplication: whoever makes the residual stream leaves the sums of its squares
behind, one for each program and row, and the norm's scale is taken to the finished sums.

    o, down   stream = x W^T + residual, squares      gate, up   silu(norm(stream) G^T) * norm(stream) U^T

Shapes: T tokens, I input width, O output width, P programs of the product that made the stream.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.ops.triton.tiles import dot_precision, fetch, room
from octavo.ops.weight import Dense, Fp8Weight

MOST_ROWS = 16
_MOST_WEIGHTS = 2**23
_WARPS = 4
_BESIDE = 8 * 1024  # bytes of shared memory that a program takes for more than the tiles of its loop
_LEAST_INPUTS = 512  # of a turn of a program's loop, or twice as many


@dataclass(slots=True)
class Normed:
    """The norm of a stream whose squares are known in parts, `squares_PT`."""

    stream_TI: torch.Tensor
    squares_PT: torch.Tensor
    weight_I: torch.Tensor
    eps: float


def suits(rows: int, weight_OI: Dense) -> bool:
    """Whether this is the faster way, as measured in docs/decisions/0083; it always is for fp8."""
    if rows > MOST_ROWS:
        return False
    if isinstance(weight_OI, Fp8Weight):
        return weight_OI.values_OI.shape[1] % _LEAST_INPUTS == 0
    return weight_OI.numel() <= _MOST_WEIGHTS and weight_OI.shape[1] % _LEAST_INPUTS == 0


def matmul(x_TI: torch.Tensor, weight_OI: Dense, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`x W^T + b`."""
    out_TO = torch.empty((len(x_TI), len(weight_OI)), dtype=x_TI.dtype, device=x_TI.device)
    write_matmul(x_TI, None, weight_OI, bias_O, out_TO, pdl=pdl)
    return out_TO


def write_matmul(
    x_TI: torch.Tensor,
    norm: Normed | None,
    weight_OI: Dense,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    """As `matmul`, into `out_TO`; of a norm instead of `x_TI` if there is one."""
    _launch(x_TI, norm, weight_OI, bias_O, out_TO, pdl=pdl)


def silu_matmul(
    x_TI: torch.Tensor, norm: Normed | None, weight_2FI: Dense, bias: torch.Tensor | None, *, pdl: bool
) -> torch.Tensor:
    """`silu(gate) * up`, [T, F], of gate and up = `x W^T + b`."""
    out_TF = torch.empty((len(x_TI), len(weight_2FI) // 2), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, norm, weight_2FI, bias, out_TF, gated=True, pdl=pdl)
    return out_TF


def add_matmul(
    x_TI: torch.Tensor,
    norm: Normed | None,
    weight_OI: Dense,
    bias_O: torch.Tensor | None,
    residual_TO: torch.Tensor,
    *,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x W^T + b + residual`, and the squares of its rows in parts, [P, T]."""
    stream_TO = torch.empty_like(residual_TO)
    squares_PT = torch.empty(
        (triton.cdiv(len(weight_OI), _outputs(weight_OI)), MOST_ROWS), dtype=torch.float32, device=x_TI.device
    )
    _launch(x_TI, norm, weight_OI, bias_O, stream_TO, residual_TO, squares_PT, pdl=pdl)
    return stream_TO, squares_PT


def _outputs(weight_OI: Dense) -> int:
    """Outputs of a program: fewer where there would not be a program for each multiprocessor."""
    return 16 if len(weight_OI) >= 2048 else 8


def _turn(inputs: int, width: int, shared_memory: int) -> tuple[int, int]:
    """(inputs of a turn of the loop, turns under way) for tiles of `width` bytes an input, as shared memory allows."""
    for at_once in (2 * _LEAST_INPUTS, _LEAST_INPUTS):
        for stages in (3, 2):
            if inputs % at_once == 0 and at_once * width * (stages if inputs > at_once else 1) <= shared_memory:
                return at_once, stages
    return _LEAST_INPUTS, 1


def _launch(
    x: torch.Tensor,
    norm: Normed | None,
    weight_OI: Dense,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    *,
    gated: bool = False,
    pdl: bool,
) -> None:
    values_OI = weight_OI.values_OI if isinstance(weight_OI, Fp8Weight) else weight_OI
    outputs, inputs = out.shape[1], values_OI.shape[1]
    block_n = _outputs(weight_OI)
    width = MOST_ROWS * x.element_size() + block_n * (1 + gated) * values_OI.element_size()
    at_once, stages = _turn(inputs, width, room(x.device) - _BESIDE)
    parts = len(norm.squares_PT) if norm else 1
    _matmul[(triton.cdiv(outputs, block_n),)](
        norm.stream_TI if norm else x,
        values_OI,
        weight_OI.scale_O if isinstance(weight_OI, Fp8Weight) else values_OI,
        values_OI if bias is None else bias,
        out,
        norm.weight_I if norm else out,
        norm.squares_PT if norm else out,
        out if residual is None else residual,
        out if left is None else left,
        len(x),
        outputs,
        parts,
        norm.eps if norm else 0.0,
        INPUTS=inputs,
        BLOCK_T=MOST_ROWS,
        BLOCK_N=block_n,
        SLICES=_WARPS,
        BLOCK_K=at_once // _WARPS,
        PARTS=triton.next_power_of_2(parts),
        SCALED=isinstance(weight_OI, Fp8Weight),
        BIASED=bias is not None,
        NORMED=norm is not None,
        GATED=gated,
        ADDED=residual is not None,
        PRECISION=dot_precision(x.dtype),
        PDL=pdl,
        num_warps=_WARPS,
        num_stages=stages,
        launch_pdl=pdl,
    )


@triton.jit
def _matmul(
    x,
    weight,
    scales,
    bias,
    out,
    norm,
    squares,
    residual,
    left,
    tokens,
    outputs,
    parts,
    eps,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    STEP: tl.constexpr = SLICES * BLOCK_K
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    at = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    row = weight + output.to(tl.int64)[None, :, None] * INPUTS
    up = row + outputs.to(tl.int64) * INPUTS
    line = x + token[None, :, None] * INPUTS
    here, given = (output < outputs)[None, :, None], (token < tokens)[None, :, None]
    first = tl.load(row + at, mask=here, other=0.0)
    first_up = first
    if GATED:
        first_up = tl.load(up + at, mask=here, other=0.0)
    if PDL:
        ahead = tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * INPUTS + tl.arange(0, STEP // 64)[None, :] * 64
        for start in tl.static_range(STEP, INPUTS, STEP):
            fetch(weight + ahead + start)
            if GATED:
                fetch(weight + outputs.to(tl.int64) * INPUTS + ahead + start)
        gdc_wait()
    values = tl.load(line + at, mask=given, other=0.0)
    if NORMED:
        values = (values.to(tl.float32) * tl.load(norm + at).to(tl.float32)).to(values.dtype)
    sums = tl.dot(values, tl.trans(first.to(values.dtype), (0, 2, 1)), input_precision=PRECISION)
    sums_up = sums
    if GATED:
        sums_up = tl.dot(values, tl.trans(first_up.to(values.dtype), (0, 2, 1)), input_precision=PRECISION)
    for start in range(STEP, INPUTS, STEP):
        weights = tl.load(row + start + at, mask=here, other=0.0)
        values = tl.load(line + start + at, mask=given, other=0.0)
        if NORMED:
            values = (values.to(tl.float32) * tl.load(norm + start + at).to(tl.float32)).to(values.dtype)
        sums = tl.dot(values, tl.trans(weights.to(values.dtype), (0, 2, 1)), sums, input_precision=PRECISION)
        if GATED:
            weights = tl.load(up + start + at, mask=here, other=0.0)
            sums_up = tl.dot(values, tl.trans(weights.to(values.dtype), (0, 2, 1)), sums_up, input_precision=PRECISION)
    result, result_up = tl.sum(sums, 0), tl.sum(sums_up, 0)
    if NORMED:
        part = tl.arange(0, PARTS)[:, None]
        total = tl.sum(tl.load(squares + part * BLOCK_T + token[None, :], mask=part < parts, other=0.0), 0)
        scale = tl.rsqrt(total / INPUTS + eps)[:, None]
        result, result_up = result * scale, result_up * scale
    if SCALED:
        result *= tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
        if GATED:
            result_up *= tl.load(scales + outputs + output, mask=output < outputs, other=0.0)[None, :]
    if BIASED:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
        if GATED:
            result_up += tl.load(bias + outputs + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * result_up
    place = token[:, None] * outputs + output[None, :]
    mask = (token < tokens)[:, None] & (output < outputs)[None, :]
    if ADDED:
        result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        kept = tl.where(mask, result, 0.0).to(out.dtype.element_ty).to(tl.float32)
        tl.store(left + tl.program_id(0) * BLOCK_T + token, tl.sum(kept * kept, 1))
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
