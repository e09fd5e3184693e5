"""A source of tensors that gives the layers' matrices in fp8, made from the source underneath one by one.

The head keeps the model's dtype, as the embedding does, which it often is.
"""

import torch

from octavo.layers.quant import fp8
from octavo.models.weights import TensorSource
from octavo.ops.weight import Table, Weight


class Fp8Tensors:
    """`source` with all matrices quantized but those that are named in `kept`."""

    def __init__(self, source: TensorSource, kept: set[str]):
        self._source = source
        self._kept = kept

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._source.tensor(name, shape)

    def joined(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        return self._source.joined(names, sizes)

    def weight(self, names: list[str], rows: list[int], in_features: int) -> Weight:
        if self._kept.issuperset(names):
            return self._source.weight(names, rows, in_features)
        parts = []
        for name, count in zip(names, rows, strict=True):
            part = self._source.weight([name], [count], in_features)
            assert isinstance(part, torch.Tensor)
            parts.append(fp8.quantize(part))
        return fp8.join(parts)

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        return self._source.table(name, shape)

    def tied(self, name: str, shape: tuple[int, int], table: Table) -> Weight:
        return self._source.tied(name, shape, table)
