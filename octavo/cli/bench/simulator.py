"""The real scheduler and block manager in simulated time: steps are made, but nobody computes them.

How long a step would take is a simple model of a device. Tokens are drawn from nothing, so answers end where
`max_tokens` ends them. Knows no memory but what the scheduler says of it.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from octavo.batch import Batch, StepResult
from octavo.config import EngineConfig, EngineOptions, ModelConfig, RopeConfig
from octavo.engine.scheduler import Scheduler
from octavo.metrics import EngineStats
from octavo.request import Request

VOCAB = 50_272


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: reading the weights or multiplying by them, whichever is longer, and reading K and V."""

    weights: float
    per_token: float
    per_context_token: float

    def of(self, num_tokens: int, context: int) -> float:
        """`num_tokens` computed, over `context` tokens of K and V."""
        return max(self.weights, num_tokens * self.per_token) + context * self.per_context_token


# OPT-13B in 16 bits on an A100 of 40 GB: 26 GB of weights and 800 KiB of K and V a token at 1.555 TB/s, 26 GFLOP a
# token at half of 312 TFLOP/s. Left for K and V are 15.7 thousand tokens (Kwon et al. 2023, table 1).
A100_OPT_13B = StepTime(weights=0.0167, per_token=0.000167, per_context_token=0.53e-6)
OPT_13B_SLOTS = 15_700
OPT_LENGTH = 2048


def engine_config(num_tokens: int, block_size: int = 16, **changes: object) -> EngineConfig:
    """A configuration with room for `num_tokens` tokens; the model's numbers decide nothing."""
    model = ModelConfig(
        architecture="simulated",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        max_position=OPT_LENGTH,
        norm_eps=1e-5,
        rope=RopeConfig(rotary_dim=64),
    )
    values: dict[str, object] = {
        "model": model,
        "dtype": "float16",
        "kv_dtype": "float16",
        "weights": "plain",
        "device": "cuda",
        "max_model_len": OPT_LENGTH,
        "block_size": block_size,
        "num_blocks": num_tokens // block_size,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 2048,
        "seed": 0,
    }
    values |= changes
    settled = {field.name for field in fields(EngineConfig)}
    chosen: dict[str, Any] = {name: values.pop(name) for name in values.keys() - settled}
    return EngineConfig(options=EngineOptions(**chosen), **values)  # type: ignore[arg-type]


class Simulation:
    """Requests that arrive at given times, and a clock that each step moves on.

    `first_token` and `ended` hold the moment of each request by its id, in seconds from the start.
    """

    def __init__(self, config: EngineConfig, time: StepTime = A100_OPT_13B):
        self.scheduler = Scheduler(config)
        self.now = 0.0
        self.first_token: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self._time = time
        self._arrivals: list[tuple[float, int, Request]] = []

    def add(self, request: Request, arrival: float = 0.0) -> None:
        """Lets `request` come at `arrival`."""
        request.arrival = arrival
        heapq.heappush(self._arrivals, (arrival, len(self._arrivals), request))

    def run(self, watch: Callable[[EngineStats], None] = lambda stats: None, until: float = float("inf")) -> None:
        """Runs until nobody is left, or to the moment `until`; `watch` sees the state after each step."""
        while self.now < until and (self._arrivals or self.scheduler.has_work()):
            if not self.scheduler.has_work():
                self.now = max(self.now, self._arrivals[0][0])
            while self._arrivals and self._arrivals[0][0] <= self.now:
                self.scheduler.add(heapq.heappop(self._arrivals)[2])
            self._step()
            watch(self.scheduler.stats())

    def _step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None, "there is work, but no step"
        batch = step if isinstance(step, Batch) else self.scheduler.whole()
        self.now += self._seconds(batch)
        drawn = np.zeros(len(batch.sample_index), np.int32)
        for name, _, _, reason, *_ in self.scheduler.update(StepResult(drawn)).tokens:
            self.first_token.setdefault(name, self.now)
            if reason is not None:
                self.ended[name] = self.now

    def _seconds(self, batch: Batch) -> float:
        return self._time.of(batch.num_tokens, int(batch.seq_lens.sum()))
