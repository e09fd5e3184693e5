"""The engine: requests in, tokens out, one step at a time. The loop that everything else serves.

It joins the scheduler, which decides, with an executor, which computes. It knows no text and no HTTP, and is used as
it is by the offline `LLM` and by the engine process of the server.
"""

import time
from typing import TYPE_CHECKING

from octavo.config import EngineConfig, EngineOptions
from octavo.engine.process import EngineInfo
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import StepOutput
from octavo.log import logger
from octavo.memory import MemoryPlan
from octavo.metrics import EngineStats
from octavo.request import Request

if TYPE_CHECKING:
    from octavo.runner.executor import Executor


class Engine:
    """Runs requests on an executor."""

    def __init__(self, config: EngineConfig, executor: "Executor", plan: MemoryPlan | None = None):
        self.config = config
        self.plan = plan
        self.timeline: list[tuple[str, float]] = []
        self.scheduler = Scheduler(config)
        self.executor = executor
        self._step_seconds = 0.0

    @classmethod
    def build(cls, options: EngineOptions) -> "Engine":
        """Opens the model, plans the memory, loads the weights and allocates the cache; says each with its time.

        Raises `CheckpointError`, `ConfigError`, `CapacityError` or `DownloadError`, the cheap checks first.
        """
        from octavo.runner.build import build_executor

        began = time.monotonic()
        executor, config, plan, timeline = build_executor(options)
        engine = cls(config, executor, plan)
        engine.timeline = [*timeline, ("engine ready", time.monotonic() - began)]
        for line in plan.lines():
            logger.info(line)
        logger.info("start: %s", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in engine.timeline))
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

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> StepOutput:
        """What the oldest step under way brings, after as many more were submitted as the executor takes ahead.

        Empty if there is no work.
        """
        began = time.perf_counter()
        while self.scheduler.steps_under_way < self.executor.depth and (batch := self.scheduler.schedule()):
            self.executor.submit(batch)
        if not self.scheduler.steps_under_way:
            return StepOutput(tokens=[])
        output = self.scheduler.update(self.executor.result())
        self._step_seconds += time.perf_counter() - began
        return output

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        stats.step_seconds = self._step_seconds
        return stats

    def shutdown(self) -> None:
        self.executor.shutdown()
