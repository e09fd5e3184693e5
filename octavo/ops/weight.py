"""What a matrix of weights may be: a tensor, or something packed that only one device's kernels can read."""

from typing import TYPE_CHECKING, TypeAlias, Union

from octavo.kernels.weights import PackedWeight, StoredRows

if TYPE_CHECKING:
    import torch

Weight: TypeAlias = Union["torch.Tensor", PackedWeight]
# Rows that are looked up one by one: StoredRows stay in the mapped file as they are.
Table: TypeAlias = Union["torch.Tensor", StoredRows]
