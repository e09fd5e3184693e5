"""A model's files as one thing: configuration, tensors and tokenizer data, whatever the format on disk.

`open_checkpoint` takes what a user names. Every format speaks Hugging Face's words: `config` reads like config.json,
tensors carry Hugging Face's names in [out, in] order. Bytes stay bytes here: no torch, no arithmetic on weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor. `dtype` is the format's own word: F32, F16, BF16, Q4_1, Q6_K, ...; `shape` is [out, in]."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint(Protocol):
    """A model's files, opened. Tensors are mapped, not read, until their bytes are touched."""

    path: Path
    config: dict[str, Any]  # as config.json
    generation_config: dict[str, Any]  # as generation_config.json; empty if there is none
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, a flat view of the mapped file, rows in [out, in] order."""
        ...
