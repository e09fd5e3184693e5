"""What the endpoints share: the engine, the model's words, the options, and whether requests are taken now."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.config import ServerOptions
from octavo.engine.limits import Limits
from octavo.engine.process import EngineClient
from octavo.errors import EngineDeadError, nearest, short
from octavo.request import Request
from octavo.server.access import Caller, Keys
from octavo.server.answer import Answer
from octavo.server.dialect import Dialect
from octavo.server.failure import RefusedError
from octavo.server.metrics import Metrics
from octavo.server.model import ServedModel


@dataclass(slots=True)
class Service:
    """`model` is None until it is loaded; `draining` says that the server takes nothing more.

    `num_open` HTTP requests are being answered; `quiet` is set while there are none.
    """

    engine: EngineClient
    options: ServerOptions
    metrics: Metrics
    model: ServedModel | None = None
    dialect: Dialect = field(default_factory=Dialect)
    loading: bool = False
    draining: bool = False
    num_open: int = 0
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    keys: Keys = field(default_factory=Keys)

    def enter(self) -> None:
        """One more HTTP request is being answered."""
        self.num_open += 1
        self.quiet.clear()

    def leave(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self.quiet.set()

    def trouble(self) -> str | None:
        """Why the server should be started anew, or None. A model that is loading is no reason."""
        return None if self.loading else self.engine.trouble(self.options.stall_timeout)

    def unready(self) -> str | None:
        """Why no request is taken now, or None."""
        if self.draining:
            return "the server is shutting down"
        if self.model is None or self.loading:
            return "the model is loading"
        return None

    def ready_model(self) -> ServedModel:
        """The model, if requests are taken now; a `RefusedError` otherwise."""
        if (reason := self.unready()) is not None:
            raise RefusedError(503, f"{reason}; try again later", code="not_ready")
        assert self.model is not None, "unready says so"
        return self.model

    def model_named(self, name: str | None) -> ServedModel:
        """The model that a client calls `name`; None is whatever is served."""
        model = self.ready_model()
        if name is not None and name not in model.names:
            known = " and ".join(map(repr, model.names))
            raise RefusedError(
                404,
                f"the model {short(name)} is not served here, but {known} {'are' if model.aliases else 'is'}."
                f"{nearest(name, model.names)}",
                param="model",
                code="model_not_found",
            )
        return model

    def cache_salt(self, asked: str | None, caller: Caller) -> str | None:
        """What keeps the cached prefixes of a request apart: what it `asked` for, and its key if that is an option."""
        return f"{caller.key} {asked or ''}" if self.options.isolate_prefix_cache else asked

    @property
    def limits(self) -> Limits:
        if self.engine.info is None:
            raise EngineDeadError(self.unready() or self.trouble() or "the engine is not running")
        return self.engine.info.limits

    async def answer(self, requests: Sequence[Request], prompts: Sequence[str | None], whole: bool) -> Answer:
        """Submits `requests`; raises what `Answer.submit` does."""
        answer = Answer(self.engine, self.ready_model(), self.metrics)
        await answer.submit(requests, prompts, whole)
        return answer
