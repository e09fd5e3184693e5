"""What a model's files are to the rest of Octavo, in any format: tensors by name, a configuration, a tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor.

    `dtype` is the format's own word: F32, F16, BF16, Q4_1, Q6_K, ...; `shape` is [out, in].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """What a model's files say about its tokenizer; `text/tokenizer` makes one of it.

    Either `json` holds tokenizer.json and `settings` tokenizer_config.json, or `ggml` holds the `tokenizer.*`
    metadata of a GGUF file, or `ranks` the tokens of a `.tiktoken` file in their order. `chat_templates` maps names
    to template sources; the usual one is `default`.
    """

    path: Path
    json: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ggml: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[bytes] = ()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)


class Checkpoint(Protocol):
    """A model's files, opened. Tensors are mapped, not read, until their bytes are touched."""

    path: Path
    config: dict[str, Any]  # as config.json
    generation_config: dict[str, Any]  # as generation_config.json; empty if there is none
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, flat, rows in [out, in] order; a view of the mapped file where
        possible.

        `name` must be one of `tensors`. Do not write into the array.
        """
        ...

    def tokenizer_data(self) -> TokenizerData:
        """The tokenizer's files; raises `CheckpointError` if the model has none."""
        ...


class Description(Protocol):
    """What a model says of its shape, before it is fetched or when it is open."""

    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]


# Raises an `OctavoError` for a model that is of no use.
Check = Callable[[Description], None]
