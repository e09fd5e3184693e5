"""What a matrix of weights may be: a tensor, 8-bit numbers with scales, or packed for one device's kernels alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, Union

from octavo.kernels.weights import PackedWeight, StoredRows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """The matrix `values_OI * scale_O`: values in e4m3 (float8_e4m3fn), in fp32 a scale for each output."""

    values_OI: "torch.Tensor"
    scale_O: "torch.Tensor"

    def __len__(self) -> int:
        return len(self.values_OI)


Weight: TypeAlias = Union["torch.Tensor", Fp8Weight, PackedWeight]
# What kernels for any dense matrix take.
Dense: TypeAlias = Union["torch.Tensor", Fp8Weight]
# Rows that are looked up one by one: StoredRows stay in the mapped file as they are.
Table: TypeAlias = Union["torch.Tensor", StoredRows]
