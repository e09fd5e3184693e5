"""Products of large weights with few rows, in halves that the addition behind joins: for decoding small batches.

cuBLAS splits such a product along its inputs, since there are too few outputs to keep a GPU busy, and then adds up in a
kernel of its own. Asked for two products of half the inputs it needs none: the norm adds three numbers instead of two.
Measured in docs/decisions/0083.

Shapes: T tokens, I input width, O output width.
"""

import torch

from octavo.ops.triton import matvec
from octavo.ops.weight import Dense

MOST_ROWS = 64
_LEAST_WEIGHTS = 2**23
# Beyond so many rows only where a row of weights is this many times as long as there are rows of weights.
_FEW_ROWS = 16
_LONG = 2


def suits(rows: int, weight_OI: Dense) -> bool:
    """Whether this is the faster way, on a GPU, to a product that is added to something, and torch has it."""
    if not isinstance(weight_OI, torch.Tensor) or weight_OI.dtype == torch.float32 or rows <= matvec.MOST_ROWS:
        return False
    outputs, inputs = weight_OI.shape
    large = weight_OI.numel() >= _LEAST_WEIGHTS
    return large and inputs % 16 == 0 and rows <= (MOST_ROWS if inputs >= _LONG * outputs else _FEW_ROWS)


def in_halves(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """[2, T, O] in fp32, whose sum is `x W^T`."""
    T, inputs = x_TI.shape
    halves_2TI = x_TI.view(T, 2, inputs // 2).transpose(0, 1)
    weights_2IO = weight_OI.view(len(weight_OI), 2, inputs // 2).permute(1, 2, 0)
    return torch.bmm(halves_2TI, weights_2IO, out_dtype=torch.float32)
