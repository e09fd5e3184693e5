"""The line that the engine logs now and then while it works: requests, speed, and where the KV memory is.

Knows `EngineStats` and nothing of how they come about. Between requests it says nothing.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from octavo.log import logger
from octavo.metrics import EngineStats

INTERVAL = 10.0  # seconds


class Report:
    """Told the state after every step; logs it at most every `INTERVAL` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._next = clock() + INTERVAL
        self._last = EngineStats()

    def step(self, stats: EngineStats) -> None:
        """Logs `stats` if it is time."""
        if (now := self._clock()) < self._next:
            return
        logger.info(line(stats, self._last))
        self._next = now + INTERVAL
        self._last = replace(stats)


def line(stats: EngineStats, since: EngineStats) -> str:
    """`stats` for a person. Speed is that of the steps after `since`, whatever time lay between them."""
    seconds = stats.step_seconds - since.step_seconds
    speed = (stats.output_tokens - since.output_tokens) / seconds if seconds else 0.0
    return (
        f"{stats.running} running, {stats.waiting} waiting, {speed:,.1f} tokens/s; KV cache:"
        f" {stats.stored_tokens:,} tokens stored, {stats.empty_slots:,} slots empty ({stats.waste:.1%} waste),"
        f" {stats.blocks_cached * stats.block_size:,} cached, {stats.blocks_free * stats.block_size:,} free"
    )
