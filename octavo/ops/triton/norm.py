"""RMSNorm, alone or fused with the addition to the residual stream, one program a row.

Shapes as in `octavo.ops`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` is [T, D], or heads [T, N, H] that may lie inside wider rows."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    write_rms_norm(x, weight, eps, out)
    return out


def write_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `rms_norm`, into `out`."""
    width = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    head_stride = x.stride(1) if x.dim() == 3 else 0
    block = triton.next_power_of_2(width)
    _rms_norm[(len(x) * heads,)](
        x, weight, out, heads, x.stride(0), head_stride, eps, D=width, BLOCK=block, num_warps=_warps(block)
    )


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    out, stream = torch.empty_like(x), torch.empty_like(x)
    write_add_rms_norm(x, residual, weight, eps, out, stream, pdl=pdl)
    return out, stream


def write_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    stream: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    """As `add_rms_norm`, into `out` and `stream`; of the sum of several `x` where it is [P, T, D]."""
    parts = len(x) if x.dim() == 3 else 1
    block = triton.next_power_of_2(x.shape[-1])
    _add_rms_norm[(len(residual),)](
        x,
        residual,
        weight,
        out,
        stream,
        eps,
        residual.numel(),
        D=x.shape[-1],
        BLOCK=block,
        PARTS=parts,
        PDL=pdl,
        num_warps=_warps(block),
        launch_pdl=pdl,
    )


def _warps(block: int) -> int:
    """Eight elements a thread, which is one 16-byte access of a 16-bit type."""
    return min(16, max(1, block // 256))


@triton.jit
def _rms_norm(x, weight, out, heads, x_stride, head_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    start = (row // heads) * x_stride + (row % heads) * head_stride
    values = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    normed = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    out,
    stream,
    eps,
    part_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    here = row * D + at
    total = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x + part * part_stride + here, mask=inside, other=0.0)
    total += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
    # The stream is kept in the model's dtype, and what is normed is what is kept.
    kept = total.to(stream.dtype.element_ty)
    tl.store(stream + here, kept, mask=inside)
    values = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    normed = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, normed.to(out.dtype.element_ty), mask=inside)
