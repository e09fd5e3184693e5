"""What engines did before blocks: a request's K and V in one piece of memory, reserved when it joins the batch.

The same continuous batching, queue and step time as the simulated Octavo; what differs is how much is reserved. The
memory is one region, and a request takes the first hole that is large enough, to the token: kinder to these baselines
than the buddy allocator of Kwon et al. 2023.
"""

from collections.abc import Callable
from dataclasses import dataclass

from octavo.cli.bench.simulator import OPT_LENGTH, StepTime

Reserve = Callable[[int, int], int]  # from the tokens of prompt and answer to the slots to reserve

RESERVES: dict[str, Reserve] = {
    "contiguous_max": lambda prompt, answer: OPT_LENGTH,
    "contiguous_pow2": lambda prompt, answer: prompt + (1 << (answer - 1).bit_length()),
    "oracle": lambda prompt, answer: prompt + answer,
}


@dataclass(slots=True)
class _Running:
    start: int
    reserved: int
    prompt: int
    total: int  # tokens of prompt and answer
    computed: int = 0
    known: int = 0  # the prompt, and what has been drawn


class Contiguous:
    """Requests of (prompt, answer) tokens, all waiting at the start, over `num_slots` slots."""

    def __init__(self, num_slots: int, reserve: Reserve, time: StepTime, budget: int):
        self.now = 0.0
        self._num_slots = num_slots
        self._reserve = reserve
        self._time = time
        self._budget = budget
        self._running: list[_Running] = []  # by `start`

    def run(self, shapes: list[tuple[int, int]], watch: Callable[[int, int, int, bool], None]) -> None:
        """Serves `shapes`; after each step `watch` gets requests, tokens stored, slots reserved, whether any waits."""
        waiting = shapes[::-1]
        while waiting or self._running:
            while waiting and self._admit(*waiting[-1]):
                waiting.pop()
            self._step()
            stored, reserved = (sum(getattr(x, name) for x in self._running) for name in ("computed", "reserved"))
            watch(len(self._running), stored, reserved, bool(waiting))
            self._running = [x for x in self._running if x.known < x.total]

    def _admit(self, prompt: int, answer: int) -> bool:
        """Reserves the first hole that is large enough; False if there is none."""
        wanted, end = self._reserve(prompt, answer), 0
        for i, start in enumerate([*(x.start for x in self._running), self._num_slots]):
            if start - end >= wanted:
                self._running.insert(i, _Running(end, wanted, prompt, prompt + answer, known=prompt))
                return True
            if i < len(self._running):
                end = start + self._running[i].reserved
        return False

    def _step(self) -> None:
        budget, tokens = self._budget, 0
        for x in sorted(self._running, key=lambda x: x.known - x.computed > 1):  # streams before prompts
            n = min(x.known - x.computed, budget - tokens)
            x.computed += n
            tokens += n
            x.known += n > 0 and x.computed == x.known
        self.now += self._time.of(tokens, sum(x.computed for x in self._running))
