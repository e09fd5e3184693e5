"""The engine: requests in, tokens out, one step at a time. The loop that everything else serves.

It joins the scheduler, which decides, with an executor, which computes. It knows no text and no HTTP, and is used as
it is by the offline `LLM` and by the engine process of the server.
"""

import time
from typing import TYPE_CHECKING

import numpy as np

from octavo.checkpoint import Checkpoint
from octavo.config import EngineConfig, EngineOptions
from octavo.engine.info import EngineInfo
from octavo.engine.prefix_store import PrefixStore, open_folder
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import StepOutput
from octavo.log import logger
from octavo.memory import MemoryPlan
from octavo.metrics import EngineStats
from octavo.request import Request
from octavo.timeline import Timeline, describe

if TYPE_CHECKING:
    from octavo.runner.executor import Executor

SAVING_SECONDS = 3.0  # for blocks that the prefix store lacks, at the end


class Engine:
    """Runs requests on an executor."""

    def __init__(
        self,
        config: EngineConfig,
        executor: "Executor",
        plan: MemoryPlan | None = None,
        store: PrefixStore | None = None,
    ):
        self.config = config
        self.plan = plan
        self.timeline: Timeline = []
        self.scheduler = Scheduler(config, store)
        self._store = store
        self.executor = executor
        self._step_seconds = 0.0

    @classmethod
    def build(cls, options: EngineOptions, checkpoint: Checkpoint | None = None) -> "Engine":
        """Opens the model if it is not open yet, plans the memory, loads weights and allocates the cache.

        The log says each with its time. Cheap checks come first. Raises `CheckpointError`, `ConfigError`,
        `CapacityError` or `DownloadError`.
        """
        began = time.monotonic()
        from octavo.runner.build import build_executor

        imported = time.monotonic() - began
        folder = open_folder(options.prefix_cache_dir) if options.prefix_cache_dir else None
        executor, config, plan, timeline, fingerprint = build_executor(options, checkpoint)
        store = None
        if folder is not None:
            store = PrefixStore(folder, fingerprint, executor.block_bytes, options.prefix_cache_size)
            logger.info("prefix cache: %d blocks of any model in %s", store.num_files, folder)
        engine = cls(config, executor, plan, store)
        engine.timeline = [("runner imports", imported), *timeline, ("engine ready", time.monotonic() - began)]
        for line in plan.lines():
            logger.info(line)
        logger.info("start: %s", describe(engine.timeline))
        return engine

    def info(self) -> EngineInfo:
        return EngineInfo(
            limits=self.scheduler.limits,
            device=self.config.device,
            dtype=self.config.dtype,
            plan=self.plan.lines() if self.plan else [],
            timeline=self.timeline,
        )

    def add(self, request: Request) -> None:
        """Queues `request`; raises `RequestError` if it could never run here."""
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or only its sample `index`; its blocks are free before the next step."""
        self.scheduler.abort(request_id, index)

    def prepare(self) -> bool:
        """Does something that later steps would wait for, while there is no work; False if there is nothing."""
        return self.executor.prepare()

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> StepOutput:
        """What the oldest step under way brings, after as many more were submitted as the executor takes ahead.

        Empty if there is no work.
        """
        began = time.perf_counter()
        while self.scheduler.steps_under_way < self.executor.depth and (step := self.scheduler.schedule()):
            self.executor.submit(step, self.scheduler.whole)
        if not self.scheduler.steps_under_way:
            return StepOutput(tokens=[])
        output = self.scheduler.update(self.executor.result())
        self.save_cold()
        self._step_seconds += time.perf_counter() - began
        return output

    def save_cold(self) -> bool:
        """Hands some blocks that nobody uses any more to the prefix store; whether there may be more."""
        if self._store is None or not (room := self._store.room):
            return False
        cold = self.scheduler.admission.cold_blocks(room)
        if not cold:
            return False
        content = self.executor.read_blocks(np.array([block for _, block in cold], np.int32))
        for (block_hash, _), piece in zip(cold, content, strict=True):
            self._store.put(block_hash, piece)
        return True

    def save_idle(self) -> bool:
        """As `save_cold`, for when there is nothing better to do: waits for the disk."""
        if self._store is None or self.has_work():
            return False
        if not self._store.room:
            self._store.flush()
        return self.save_cold()

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        stats.step_seconds = self._step_seconds
        stats.blocks_saved = self._store.num_written if self._store else 0
        return stats

    def reset(self) -> None:
        """Drops all requests and steps, and what the prefix cache has: whatever state they were in, the engine is as
        new. The model stays."""
        self.executor.reset()
        self.scheduler = Scheduler(self.config, self._store)

    def shutdown(self) -> None:
        """Ends the executor; what is still cold is saved first, as far as a few seconds go."""
        if self._store is not None:
            until = time.monotonic() + SAVING_SECONDS
            while time.monotonic() < until and self.save_cold():
                self._store.flush()
            self._store.close()
        self.executor.shutdown()
