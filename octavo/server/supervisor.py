"""A server's life: the model loads, the engine may die and come back, and at a signal the server drains.

Decides when the server stops and with which exit code; knows no HTTP and starts no listener.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any

from octavo.errors import EngineDeadError, OctavoError
from octavo.log import logger
from octavo.server.model import ServedModel
from octavo.server.service import Service
from octavo.timeline import Timeline

QUICK_SECONDS = 60.0  # an engine that dies sooner after its start is started again with a delay
MAX_DELAY_SECONDS = 8.0
MAX_FAILED_STARTS = 3


class Supervisor:
    """Keeps `service` alive. `stopped` is set when the server must go; `error` is then why, or None."""

    def __init__(self, service: Service, load_model: Callable[[], ServedModel]):
        self.service = service
        self.stopped = asyncio.Event()
        self.error: OctavoError | None = None
        self.timeline: Timeline = []
        self._load_model = load_model
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_since = 0.0
        self._quick_deaths = 0  # in a row
        service.engine.on_death = self.engine_died
        service.loading = True

    async def load(self) -> None:
        """Starts the engine, with the tokenizer being read meanwhile; raises what went wrong there."""
        began = time.monotonic()
        engine = asyncio.ensure_future(self.service.engine.start())
        try:
            self.service.model = await asyncio.to_thread(self._load_model)
            self.timeline.append(("tokenizer", time.monotonic() - began))
            info = await engine
        finally:
            engine.cancel()
        self.timeline += info.timeline
        self._now_ready()

    def signalled(self) -> None:
        """SIGTERM or SIGINT: the first drains, the second ends everything now."""
        if self.service.draining or self.service.loading:
            self._hurry.set()
        if not self.service.draining:
            self.service.draining = True
            self._begin(self._drain())

    def engine_died(self, reason: str) -> None:
        """The engine process ended without being asked to; its requests have their errors already."""
        logger.error("the engine died: %s", reason)
        if self.service.draining:
            self._hurry.set()
        elif self.service.options.on_engine_death == "exit":
            self._give_up(f"the engine died: {reason}")
        else:
            self.service.loading = True
            self._begin(self._restart(reason))

    def _now_ready(self) -> None:
        self._ready_since = time.monotonic()
        self.service.loading = False
        gc.collect()
        gc.freeze()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _give_up(self, reason: str) -> None:
        self.error = EngineDeadError(reason)
        self.stopped.set()

    async def _restart(self, reason: str) -> None:
        """Starts the engine again until it is ready.

        However often requests bring it down, it comes back, later and later; what cannot even start is given up.
        """
        quick = time.monotonic() - self._ready_since < QUICK_SECONDS
        self._quick_deaths = self._quick_deaths + 1 if quick else 1
        delay = min(2.0 ** (self._quick_deaths - 2), MAX_DELAY_SECONDS) if self._quick_deaths > 1 else 0.0
        failures = 0
        while failures < MAX_FAILED_STARTS:
            logger.info("starting the engine again%s", f" in {delay:g} s" if delay else "")
            await asyncio.sleep(delay)
            await self.service.engine.close()  # clears away what is left of the old process
            try:
                await self.service.engine.start()
            except OctavoError as error:
                reason = str(error)
                failures += 1
                continue
            self._now_ready()
            logger.info("the engine is back")
            return
        self._give_up(f"the engine could not be started {failures} times in a row: {reason}")

    async def _drain(self) -> None:
        """Lets open requests finish, for a while."""
        service, limit = self.service, self.service.options.drain_seconds
        if service.num_open:
            logger.info(
                "draining: %d open requests may go on for %g s; a second signal ends them now",
                service.num_open,
                limit,
            )
            quiet, hurry = (asyncio.ensure_future(event.wait()) for event in (service.quiet, self._hurry))
            await asyncio.wait({quiet, hurry}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            quiet.cancel()
            hurry.cancel()
            if service.num_open:
                logger.info("aborting %d requests", service.num_open)
        self.stopped.set()

    async def close(self) -> None:
        """Ends the engine; requests that are still open get an error."""
        for task in self._tasks:
            task.cancel()
        await self.service.engine.close()
