"""The GGUF container: metadata and the table of tensors, versions 2 and 3, little endian.

Source: ggml's docs/gguf.md. What the keys and names mean for a model is known to `gguf_model`; how a block of
a quantized type is laid out inside is known to `layers/quant`. Here, a tensor is a type, a shape and a range
of bytes.
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint.foreign import described
from octavo.checkpoint.mapped import map_file
from octavo.errors import CheckpointError

# Type word -> (elements of a block, bytes of a block). Blocks run along a row, so a row is a whole number of
# them.
BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}

# The number that stands in the file -> type word; those without a block size are known by name alone.
_TYPE_WORDS: dict[int, str] = dict(
    enumerate(
        [
            *("F32", "F16"),
            *("Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
            *("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"),
            *("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"),
        ]
    )
) | {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}

# Metadata value types: number in the file -> struct code. 8 is a string, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_NESTING = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One row of the tensor table: `shape` outermost first, `start` in bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufFile:
    """An opened GGUF file: `metadata` by key, `tensors` by the file's own names, `data` uint8 [file size],
    mapped.

    Raises `CheckpointError` when the file is not GGUF, is cut short, or holds a tensor type without a reader
    here.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: NDArray[np.uint8] = map_file(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        reader = _Reader(path, self.data)
        try:
            self._read_header(reader)
        except (struct.error, IndexError):
            raise reader.broken("ends in the middle of its header; it was cut short: fetch it again") from None
        except UnicodeDecodeError as error:
            raise reader.broken(f"has a text in its header that is not UTF-8 ({error.reason})") from None

    def _read_header(self, reader: "_Reader") -> None:
        if (magic := bytes(self.data[:4])) != b"GGUF":
            if what := described(bytes(self.data[:64])):
                raise reader.broken(f"is {what}")
            raise reader.broken(f"is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
        reader.position = 4
        version = reader.scalar("I")
        if version not in (2, 3):
            why = "big endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise reader.broken(f"is {why}; Octavo reads versions 2 and 3, little endian: convert it again")
        num_tensors, num_keys = reader.scalar("Q"), reader.scalar("Q")
        # The smallest tensor entry and the smallest key take more than 13 bytes: a damaged count stops here.
        if (num_tensors + num_keys) * 13 > len(self.data):
            raise reader.broken(
                f"was cut short or is damaged: it claims {num_tensors} tensors and {num_keys} keys; fetch it again"
            )
        for _ in range(num_keys):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar("I"))
        parts = self.metadata.get("split.count", 0)
        if type(parts) is not int or parts > 1:
            raise reader.broken(f"is one of {parts} parts; join them with `llama-gguf-split --merge` first")
        table = [self._read_entry(reader) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise reader.broken(f"has general.alignment {alignment!r}; it must be a positive number")
        start = -(-reader.position // alignment) * alignment
        for name, dtype, shape, offset in table:
            if offset % alignment:
                raise reader.broken(
                    f"places tensor {name!r} at byte {offset}, no multiple of {alignment}; fetch it again"
                )
            self._place(reader, name, dtype, shape, start, offset)
        # Tensors that share bytes would take more memory than the file has.
        placed = sorted(self.tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes))
        for first, second in pairwise(placed):
            if second.start < first.start + first.num_bytes:
                raise reader.broken(
                    f"places tensors {first.name!r} and {second.name!r} over each other; fetch it again"
                )

    def _read_entry(self, reader: "_Reader") -> tuple[str, str, tuple[int, ...], int]:
        name = reader.string()
        num_dims = reader.scalar("I")
        if num_dims > 4:
            raise reader.broken(f"gives tensor {name!r} {num_dims} dimensions; at most 4 are possible")
        shape = tuple(reader.scalar("Q") for _ in range(num_dims))[::-1]
        number = reader.scalar("I")
        dtype = _TYPE_WORDS.get(number, f"number {number}")
        if dtype not in BLOCK_SIZES:
            raise reader.broken(
                f"holds tensor {name!r} of type {dtype}, which Octavo cannot read; take a file made of "
                + ", ".join(BLOCK_SIZES)
            )
        return name, dtype, shape, reader.scalar("Q")

    def _place(self, reader: "_Reader", name: str, dtype: str, shape: tuple[int, ...], start: int, offset: int) -> None:
        block, block_bytes = BLOCK_SIZES[dtype]
        row = shape[-1] if shape else 1
        if row % block:
            raise reader.broken(f"gives tensor {name!r} rows of {row} elements; {dtype} takes multiples of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        end = start + offset + num_bytes
        if end > len(self.data):
            raise reader.broken(
                f"is cut short: tensor {name!r} ends at byte {end}, the file at {len(self.data)}; fetch it again"
            )
        if name in self.tensors:
            raise reader.broken(f"holds tensor {name!r} twice; convert the model again")
        self.tensors[name] = GgufTensor(name, dtype, shape, start + offset, num_bytes)

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, a flat view of the mapped file."""
        tensor = self.tensors[name]
        return self.data[tensor.start : tensor.start + tensor.num_bytes]


class _Reader:
    """A position that moves through the header."""

    def __init__(self, path: Path, data: NDArray[np.uint8]):
        self.path = path
        self.view = memoryview(data.data)
        self.position = 0

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.view, self.position)[0]
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # The loop that decides how fast a file opens: a vocabulary and its merges are 100,000 strings.
        view, position, size = self.view, self.position, len(self.view)
        length_at = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            begin = position + 8
            position = begin + length_at(view, position)[0]
            if position > size:
                raise IndexError
            found.append(str(view[begin:position], "utf-8"))
        self.position = position
        return found

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or nesting > _MOST_NESTING:
            raise self.broken(f"has a value of unknown type {kind} in its header; it is damaged or too new")
        item, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.view):
            raise IndexError
        if item == _STRING:
            return self.strings(count)
        if item in _SCALARS:
            kind_of_item = np.dtype("<" + _SCALARS[item])
            end = self.position + count * kind_of_item.itemsize
            if end > len(self.view):
                raise IndexError
            values = np.frombuffer(self.view[self.position : end], kind_of_item).tolist()
            self.position = end
            return values
        return [self.value(item, nesting + 1) for _ in range(count)]
