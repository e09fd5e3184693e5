"""What a matrix of weights may be: a tensor, or something packed that only one device's kernels can read."""

import torch

from octavo.kernels.weights import PackedWeight, StoredRows

Weight = torch.Tensor | PackedWeight
# Rows that are looked up one by one: StoredRows stay in the mapped file as they are.
Table = torch.Tensor | StoredRows
