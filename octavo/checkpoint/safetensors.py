"""The safetensors container: a length, a JSON header, the tensors' bytes.

Source: the format's description in the huggingface/safetensors repository. `parse_header` works on bytes, so
a header fetched alone, without the tensors behind it, can be read as well. Knows nothing of models.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint.foreign import described
from octavo.checkpoint.mapped import map_file
from octavo.errors import CheckpointError

PREFIX_BYTES = 8
_BEGINNING = 64  # bytes, by which a file that is something else is known
# The reference implementation's own bound; a larger length is noise read as a number.
MAX_HEADER_BYTES = 100_000_000
MOST_DIMENSIONS = 8

DTYPE_SIZES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header; `start` and `end` in bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_size(prefix: bytes, source: str) -> int:
    """Bytes of the JSON header, from a file's first bytes, of which 8 are needed.

    `source` names the file in a `CheckpointError`.
    """
    size = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    # A file begins with its header's size, which may look like anything else's beginning.
    plausible = len(prefix) >= PREFIX_BYTES and 0 < size <= MAX_HEADER_BYTES
    if not plausible and (what := described(prefix)):
        raise CheckpointError(f"{source} is {what}")
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{source} has {len(prefix)} bytes; it was cut short: fetch it again")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{source} is not a safetensors file: it claims a header of {size} bytes")
    return size


def parse_header(header: bytes, source: str, data_bytes: int | None = None) -> dict[str, StoredTensor]:
    """Tensors by name, from the JSON header.

    `data_bytes` is the number of bytes behind the header; when given, the tensors must cover them exactly,
    without a gap or an overlap. Raises `CheckpointError` naming `source` and what is wrong.
    """
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{source} has a header that is not JSON; it is damaged: fetch it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{source} has a header that is not a JSON object; it is damaged: fetch it again")
    entries.pop("__metadata__", None)
    tensors = {name: _parse_entry(name, entry, source) for name, entry in entries.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise CheckpointError(
                f"{source} places tensor {name!r} at byte {tensor.start} where {position} follows; it is damaged"
            )
        position = tensor.end
    if data_bytes is not None and position != data_bytes:
        what = "was cut short" if position > data_bytes else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"{source} {what}: its header describes {position} bytes, {data_bytes} are there; fetch it again"
        )
    return tensors


def _parse_entry(name: str, entry: Any, source: str) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        whole = len(shape) <= MOST_DIMENSIONS
        whole = whole and all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise CheckpointError(f"{source} describes tensor {name!r} wrongly; it is damaged: fetch it again")
    if dtype not in DTYPE_SIZES:
        known = ", ".join(DTYPE_SIZES)
        raise CheckpointError(f"{source} holds tensor {name!r} of type {dtype}; Octavo reads {known}")
    if end - start != math.prod(shape) * DTYPE_SIZES[dtype]:
        raise CheckpointError(
            f"{source} gives tensor {name!r} {end - start} bytes; {dtype} of shape {list(shape)} takes "
            f"{math.prod(shape) * DTYPE_SIZES[dtype]}"
        )
    return StoredTensor(dtype, shape, start, end)


class SafetensorsFile:
    """An opened file: `tensors` by name, their bytes mapped. Raises `CheckpointError` when it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        data = map_file(path)
        size = header_size(bytes(data[:_BEGINNING]), str(path))
        begin = PREFIX_BYTES + size
        if begin > len(data):
            raise CheckpointError(f"{path} ends in the middle of its header; it was cut short: fetch it again")
        self._data = data[begin:]
        self.tensors = parse_header(bytes(data[PREFIX_BYTES:begin]), str(path), len(self._data))

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, a flat view of the mapped file."""
        tensor = self.tensors[name]
        return self._data[tensor.start : tensor.end]
