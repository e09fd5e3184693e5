"""What the host sends to a GPU for a step, packed into one piece of pinned memory, and the tokens that come back.

The host never waits: memory is pinned, and each piece is used again only when the step that it was used for is long
over. Steps are counted in turns, on the device as well: a step that goes on from the one before it is sent nothing, and
its kernels read who gets a block, and write tokens, in the host's own memory. Knows no models.

    pinned, device   [ turn, fresh | sample_index | temperature | ... | states | token_ids | ... | block tables ]

All are numbers of 32 bits; each array begins at a multiple of 64 bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import SENT, Ints, SamplingColumns
from octavo.ops.triton.sampling import Asked
from octavo.runner import noise
from octavo.step_layout import ALIGN, places

# Steps that may be under way at once, and one that is being packed or read.
TURNS = 3
_DTYPES = {each.name: torch.float32 for each in SENT if each.dtype is np.float32}


class StepBuffers:
    """Room for `capacity` numbers beside what sampling needs, the same memory for every step: steps run in order.

    `control` is [turn, 0] of the step that ran last, or [turn, 1] of one that was sent since and is still to run.
    `blocks` (by row) and `drawn` (by sample) are there for each turn.
    """

    def __init__(self, capacity: int, max_samples: int, device: torch.device):
        names = ("sample_index", "temperature", "top_k", "top_p", "min_p")
        self._first = places({"control": 2} | dict.fromkeys(names, max_samples) | {"states": 2 * max_samples})
        self._start = self._first["states"].stop + ALIGN
        capacity += self._start
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [_pinned(capacity) for _ in range(TURNS)]
        self._arrays: list[Ints] = [pinned.numpy() for pinned in self._pinned]
        self.blocks, self.drawn = _pinned(TURNS, max_samples), _pinned(TURNS, max_samples)
        self._blocks_host, self._drawn_host = self.blocks.numpy(), self.drawn.numpy()
        self.control = self.at(self._first["control"])
        self.turn = 0

    def places(self, sizes: Mapping[str, int]) -> dict[str, slice]:
        """Where arrays of these sizes lie, one behind the other."""
        return places(sizes, self._start)

    def send(
        self,
        sample_index: NDArray[np.integer],
        columns: SamplingColumns,
        arrays: Mapping[str, NDArray[Any]],
        places: Mapping[str, slice],
    ) -> None:
        """Begins a step: copies what its samples ask for, and `arrays` to the beginnings of their `places`, of which
        the last array's is the last.

        What is left of a place keeps what it held, but samples beyond the step's are those of token 0 at temperature
        0, which asks for nothing else.
        """
        self.turn = (self.turn + 1) % TURNS
        pinned = self._arrays[self.turn]
        pinned[self._first["sample_index"]] = pinned[self._first["temperature"]] = 0
        first: dict[str, NDArray[Any]] = {
            "control": np.array([self.turn, 1], np.int32),
            "sample_index": sample_index.astype(np.int32),
            "temperature": columns.temperature,
            "top_k": columns.top_k,
            "top_p": columns.top_p,
            "min_p": columns.min_p,
            "states": noise.states(columns.seed, columns.counter),
        }
        end = 0
        for which, where in ((first, self._first), (arrays, places)):
            for name, array in which.items():
                numbers = array.reshape(-1).view(np.int32)
                start = where[name].start
                end = start + len(numbers)
                assert end <= len(pinned), "a step's arrays are larger than its largest step was said to be"
                pinned[start:end] = numbers
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

    def tensors(self, places: Mapping[str, slice]) -> dict[str, torch.Tensor]:
        """The device's numbers at each place."""
        return {name: self.at(place, _DTYPES.get(name, torch.int32)) for name, place in places.items()}

    def sample_index(self, count: int) -> torch.Tensor:
        """Of the first `count` samples that were sent last."""
        return self.at(self._first["sample_index"])[:count]

    def asked(self, count: int) -> Asked:
        """What the first `count` samples that were sent last ask for."""
        first = self._first
        return Asked(
            states_S=self.at(first["states"], torch.int64)[:count],
            temperature_S=self.at(first["temperature"], torch.float32)[:count],
            top_k_S=self.at(first["top_k"])[:count],
            top_p_S=self.at(first["top_p"], torch.float32)[:count],
            min_p_S=self.at(first["min_p"], torch.float32)[:count],
        )


def _pinned(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32, pin_memory=True)
