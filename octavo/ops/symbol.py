"""What stands for an op's result while a model's code runs on nothing, to learn which ops it calls.

A model's code may call ops and take views of what they give back; anything else would have to be known to whoever
replays or fuses the ops, and is refused by name. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

TOKENS = 2  # of a symbol: enough to see what lies in each token's row


class NotRecordableError(Exception):
    """A model computes something between the ops, which a replayed step would miss; the text says what."""


class Symbol:
    """An op's result of which nothing is known but where it will lie: [tokens, *shape], `places` in a token's rows.

        buffer 3, rows of 6:   places_T6 = 0 1 2 3 4 5    view(T, 3, 2)[:, 1:] = 2 3  4 5     still buffer 3
                                           6 7 8 9 ...                           8 9  ...

    A model may take views of it, as of a tensor. Whatever else it does with one raises `NotRecordableError`.
    """

    def __init__(self, buffer: int, places: NDArray[np.int64]):
        self.buffer = buffer
        self.places = places

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    def __len__(self) -> int:
        return len(self.places)

    def dim(self) -> int:
        return self.places.ndim

    def __getitem__(self, index: Any) -> Symbol:
        return Symbol(self.buffer, self.places[index])

    def view(self, *shape: int) -> Symbol:
        return Symbol(self.buffer, self.places.reshape(shape))

    reshape = view

    def flatten(self, start_dim: int = 0) -> Symbol:
        return self.view(*self.shape[:start_dim], -1)

    def chunk(self, chunks: int, dim: int = 0) -> list[Symbol]:
        return [Symbol(self.buffer, part) for part in np.split(self.places, chunks, axis=dim)]

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        self._refuse("an assignment in place")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        raise NotRecordableError(f"it computes torch.{function.__name__} of an op's result, between the ops")

    def _refuse(self, what: str, *_: Any) -> NoReturn:
        raise NotRecordableError(f"it uses {what} on an op's result of shape {list(self.shape)}, between the ops")


def _refusing(name: str) -> Callable[..., NoReturn]:
    return lambda self, *_: self._refuse(name)


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
for _name in [f"__{kind}{name}__" for name in _BINARY.split() for kind in ("", "r", "i")]:
    setattr(Symbol, _name, _refusing(_name))
for _name in ("__neg__", "__abs__", "__invert__", "__float__", "__bool__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Symbol, _name, _refusing(_name))
