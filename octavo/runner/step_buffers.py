"""What the host sends to a GPU for a step, packed into one piece of pinned memory, and the tokens that come back.

The host never waits: memory is pinned, and each piece is used again only when the step that it was used for is long
over. Steps are counted in turns, on the device as well: a step that goes on from the one before it is sent nothing, and
its kernels read who gets a block, and write tokens, in the host's own memory. Knows no models.

    pinned, device   [ turn, fresh | sample_index | temperature | ... | states | token_ids | ... | block tables ]

All are numbers of 32 bits; each array begins at a multiple of 64 bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Ints, SamplingColumns
from octavo.ops.triton.sampling import Asked
from octavo.runner import noise

# Steps that may be under way at once, and one that is being packed or read.
TURNS = 3
_ALIGN = 16


class StepBuffers:
    """Room for `capacity` numbers beside what sampling needs, the same memory for every step: steps run in order.

    `control` is [turn, 0] of the step that ran last, or [turn, 1] of one that was sent since and is still to run.
    `blocks` (by row) and `drawn` (by sample) are there for each turn.
    """

    def __init__(self, capacity: int, max_samples: int, device: torch.device):
        self._first = self._places((2, *(max_samples,) * 5, 2 * max_samples), 0)
        self._start = self._first[-1].stop + _ALIGN
        capacity += self._start
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [_pinned(capacity) for _ in range(TURNS)]
        self._arrays: list[Ints] = [pinned.numpy() for pinned in self._pinned]
        self.blocks, self.drawn = _pinned(TURNS, max_samples), _pinned(TURNS, max_samples)
        self._blocks_host, self._drawn_host = self.blocks.numpy(), self.drawn.numpy()
        self.control = self.at(self._first[0])
        self.turn = 0

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
        self,
        sample_index: NDArray[np.integer],
        columns: SamplingColumns,
        arrays: Sequence[NDArray[np.generic]],
        places: Sequence[slice],
    ) -> None:
        """Begins a step: copies what its samples ask for, and `arrays` to the beginnings of `places`.

        What is left of a place keeps what it held, but samples beyond the step's are those of token 0 at temperature
        0, which asks for nothing else.
        """
        self.turn = (self.turn + 1) % TURNS
        pinned = self._arrays[self.turn]
        _, index, temperature, *_ = self._first
        pinned[index] = pinned[temperature] = 0
        first: tuple[NDArray[np.generic], ...] = (
            np.array([self.turn, 1], np.int32),
            sample_index.astype(np.int32),
            columns.temperature,
            columns.top_k,
            columns.top_p,
            columns.min_p,
            noise.states(columns.seed, columns.counter),
        )
        end = 0
        for array, place in zip((*first, *arrays), (*self._first, *places), strict=True):
            numbers = array.reshape(-1).view(np.int32)
            end = place.start + len(numbers)
            assert end <= len(pinned), "a step's arrays are larger than its largest step was said to be"
            pinned[place.start : end] = numbers
        self._device[:end].copy_(self._pinned[self.turn][:end], non_blocking=True)

    def go_on(self, rows: NDArray[np.integer], blocks: Ints) -> None:
        """Begins a step that goes on from the one before: `rows` get `blocks`."""
        self.turn = (self.turn + 1) % TURNS
        if len(blocks):
            self._blocks_host[self.turn, rows] = blocks

    def tokens(self, count: int) -> Ints:
        """What the samples of this step have drawn, once it is over; another step writes here later."""
        return self._drawn_host[self.turn, :count]

    def at(self, place: slice, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """The device's numbers at `place`."""
        return self._device[place].view(dtype)

    def sample_index(self, count: int) -> torch.Tensor:
        """Of the first `count` samples that were sent last."""
        return self.at(self._first[1])[:count]

    def asked(self, count: int) -> Asked:
        """What the first `count` samples that were sent last ask for."""
        _, _, temperature, top_k, top_p, min_p, states = self._first
        return Asked(
            states_S=self.at(states, torch.int64)[:count],
            temperature_S=self.at(temperature, torch.float32)[:count],
            top_k_S=self.at(top_k)[:count],
            top_p_S=self.at(top_p, torch.float32)[:count],
            min_p_S=self.at(min_p, torch.float32)[:count],
        )


def _pinned(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32, pin_memory=True)


def padded(array: Ints, length: int, value: int) -> Ints:
    """`array`, up to `length` filled up with `value`."""
    if len(array) == length:
        return array
    whole = np.full(length, value, np.int32)
    whole[: len(array)] = array
    return whole
