"""Weights in e4m3: 8 bits with 3 of mantissa, up to 448, and a scale for each output that brings it into this range.

Shapes: O outputs, I inputs.
"""

import torch

from octavo.ops.weight import Fp8Weight

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def quantize(weight_OI: torch.Tensor) -> Fp8Weight:
    """The nearest e4m3 numbers of each row, its largest weight becoming the type's largest."""
    scale_O = weight_OI.abs().amax(dim=1).float().clamp(min=1e-12) / LARGEST
    values_OI = (weight_OI.float() / scale_O[:, None]).clamp_(-LARGEST, LARGEST).to(E4M3)
    return Fp8Weight(values_OI, scale_O)


def join(parts: list[Fp8Weight]) -> Fp8Weight:
    """One below the other."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values_OI.view(torch.uint8) for part in parts]).view(E4M3)
    return Fp8Weight(values, torch.cat([part.scale_O for part in parts]))
