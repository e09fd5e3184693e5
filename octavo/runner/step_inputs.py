"""A step's arrays on their way to a GPU: packed into one piece of pinned memory and copied at once.

The host never waits: memory is pinned, and each piece is used again only when the step that was sent from it is long
over. Knows no models.

    pinned, device   [ sample_index | temperature | keys | token_ids | positions | ... | block tables ]

All are numbers of 32 bits; each array begins at a multiple of 64 bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Ints

# Steps that may be under way at once, and one that is being packed.
_RING = 3
_ALIGN = 16


class StepInputs:
    """Room for `capacity` numbers beside what sampling needs, the same memory for every step: steps run in order."""

    def __init__(self, capacity: int, max_samples: int, device: torch.device):
        self._sampling = self._places((max_samples, max_samples, 2 * max_samples), 0)
        self._start = self._sampling[-1].stop + _ALIGN
        capacity += self._start
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [torch.zeros(capacity, dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._arrays: list[Ints] = [pinned.numpy() for pinned in self._pinned]
        self._turn = 0

    def places(self, sizes: Sequence[int]) -> list[slice]:
        """Where arrays of these sizes lie, one behind the other."""
        return self._places(sizes, -(-self._start // _ALIGN) * _ALIGN)

    @staticmethod
    def _places(sizes: Sequence[int], start: int) -> list[slice]:
        found = []
        for size in sizes:
            found.append(slice(start, start + size))
            start += -(-size // _ALIGN) * _ALIGN
        return found

    def send(
        self, sampling: Sequence[NDArray[np.generic]], arrays: Sequence[NDArray[np.generic]], places: Sequence[slice]
    ) -> None:
        """Copies sample_index, temperature and keys of a step, and `arrays`, these to the beginnings of `places`.

        What is left of a place keeps what it held, but sample indices beyond the step's are 0.
        """
        self._turn = (self._turn + 1) % _RING
        pinned = self._arrays[self._turn]
        pinned[self._sampling[0]] = 0
        end = 0
        for array, place in zip((*sampling, *arrays), (*self._sampling, *places), strict=True):
            end = place.start + array.size
            assert end <= len(pinned), "a step's arrays are larger than its largest step was said to be"
            pinned[place.start : end] = array.reshape(-1).view(np.int32)
        self.push(end)

    def again(self, end: int) -> Ints:
        """The first `end` numbers that were sent last, to be changed in place and sent by `push`."""
        last = self._arrays[self._turn]
        self._turn = (self._turn + 1) % _RING
        self._arrays[self._turn][:end] = last[:end]
        return self._arrays[self._turn]

    def push(self, end: int) -> None:
        """Copies the first `end` numbers to the device."""
        self._device[:end].copy_(self._pinned[self._turn][:end], non_blocking=True)

    @property
    def keys(self) -> slice:
        """Where the keys of the samples begin, and the last may end."""
        return self._sampling[2]

    def at(self, place: slice, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """The device's numbers at `place`."""
        return self._device[place].view(dtype)

    def sampling(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sample_index, temperature and keys ([S, 2]) of the first `count` samples that were sent last."""
        index, temperature, keys = self._sampling
        return (
            self.at(index)[:count],
            self.at(temperature, torch.float32)[:count],
            self.at(keys).view(-1, 2)[:count],
        )
