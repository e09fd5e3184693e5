"""The arrays of a step, written down once: what `Batch` holds, how it is padded, and where it lies in a buffer.

An array is a field of `Batch` with its dimensions, made by `array`. From that follow its padding to the size of a
recorded step, its place in the memory that is sent to a device, and its tensor in the forward context.

Dimensions: T tokens, R rows, M blocks of the longest row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Dims = Literal["T", "R", "R+1", "RM"]
_KEY = "step array"
# Numbers of 32 bits at whose multiples the arrays in a buffer begin.
ALIGN = 16


@dataclass(frozen=True, slots=True)
class StepArray:
    """One array of a step. `padding` stands for tokens and rows that are not there. `sent` is off for what the host
    alone reads."""

    name: str
    dims: Dims
    dtype: type
    padding: int
    sent: bool


def array(dims: Dims, dtype: type = np.int32, *, padding: int = 0, sent: bool = True) -> Any:
    """A field of a dataclass that is an array of a step."""
    return field(metadata={_KEY: (dims, dtype, padding, sent)})


def arrays_of(step: type[Any]) -> tuple[StepArray, ...]:
    """The arrays that are fields of `step`, in their order."""
    return tuple(StepArray(each.name, *each.metadata[_KEY]) for each in fields(step) if _KEY in each.metadata)


class StepSize(NamedTuple):
    """The size that a step is padded to: rows of one token, tokens of all other rows, and how many these are."""

    decode_rows: int
    tokens: int = 0
    rows: int = 0

    @property
    def all_tokens(self) -> int:
        return self.decode_rows + self.tokens

    @property
    def all_rows(self) -> int:
        return self.decode_rows + self.rows

    def sizes(self, kinds: Iterable[StepArray], max_blocks: int) -> dict[str, int]:
        """Numbers in each of these arrays, by name."""
        return {kind.name: self._numbers(kind.dims, max_blocks) for kind in kinds}

    def _numbers(self, dims: Dims, max_blocks: int) -> int:
        """Numbers in an array of these dimensions."""
        if dims == "RM":
            return self.all_rows * max_blocks
        return {"T": self.all_tokens, "R": self.all_rows, "R+1": self.all_rows + 1}[dims]

    def pad(self, array: Array, kind: StepArray, decode_rows: int) -> Array:
        """`array` of a step whose first `decode_rows` rows have one token each. Tables get no rows at their end."""
        more = self.decode_rows - decode_rows
        head, rest = array[:decode_rows], array[decode_rows:]
        if kind.dims == "R+1":
            starts = rest + np.int32(more)
            every = np.arange(self.decode_rows, dtype=array.dtype)
            return np.concatenate((every, padded(starts, self.rows + 1, int(starts[-1]))))
        if kind.dims == "RM":
            return np.concatenate((head, np.zeros((more, array.shape[1]), array.dtype), rest)) if len(rest) else array
        behind = self.tokens if kind.dims == "T" else self.rows
        first = padded(head, self.decode_rows, kind.padding)
        return np.concatenate((first, padded(rest, behind, kind.padding))) if behind else first


def padded(array: Array, length: int, value: int) -> Array:
    """`array`, up to `length` filled up with `value`."""
    if len(array) == length:
        return array
    whole = np.full(length, value, array.dtype)
    whole[: len(array)] = array
    return whole


def places(sizes: Mapping[str, int], start: int = 0) -> dict[str, slice]:
    """Where arrays of so many numbers of 32 bits lie, one behind the other from `start` on."""
    found = {}
    for name, size in sizes.items():
        start = -(-start // ALIGN) * ALIGN
        found[name] = slice(start, start + size)
        start += size
    return found
