"""The gated MLP's product, `silu(gate) * up`. Shapes as in `octavo.ops`."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def silu_mul(gate_up_T2F: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    T, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty((T, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    write_silu_mul(gate_up_T2F, out_TF, pdl=pdl)
    return out_TF


def write_silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor, *, pdl: bool) -> None:
    """As `silu_mul`, into `out_TF`."""
    T, width = out_TF.shape
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(T, triton.cdiv(width, block))](
        gate_up_T2F, out_TF, F=width, BLOCK=block, PDL=pdl, num_warps=max(1, block // 256), launch_pdl=pdl
    )


@triton.jit
def _silu_mul(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gate = tl.load(gate_up + row * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)
