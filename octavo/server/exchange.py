"""One HTTP request from its first byte to the last of its answer, as the log tells it."""

import json
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope

from octavo.log import logger
from octavo.server.access import header
from octavo.server.stream import Reply

_KEY = "octavo.exchange"  # in the scope
# A client's own id goes into a header and into the log.
_ID = re.compile(rb"[\w.:/+=@-]{1,128}")


@dataclass(slots=True)
class Exchange:
    """`request_id` is the client's own, if it sent a usable one; `status` is 0 until the answer begins."""

    method: str
    path: str
    request_id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    reply: Reply | None = None

    @classmethod
    def begin(cls, scope: Scope) -> "Exchange":
        given = header(scope["headers"], b"x-request-id")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        exchange = scope[_KEY] = cls(scope["method"], scope["path"], request_id)
        return exchange

    @staticmethod
    def of(scope: Scope) -> "Exchange":
        found = scope[_KEY]
        assert isinstance(found, Exchange), "begun by the front door"
        return found

    def log(self) -> None:
        """One line: who, what, how it ended, how many tokens, how long. No text of a prompt or an answer."""
        told: dict[str, object] = {"request_id": self.request_id, "status": self.status or 499}
        if self.reply is not None:
            answer = self.reply.answer
            usage = answer.usage()
            told["answer_id"] = self.reply.answer_id
            told |= {
                "prompt_tokens": usage.prompt,
                "cached_tokens": usage.cached,
                "completion_tokens": usage.completion,
            }
            told["finish_reasons"] = [reason or "aborted" for reason in answer.finish_reasons()]
            for name, seconds in (("queue", answer.queue_seconds()), ("first_token", answer.first_token_seconds())):
                if seconds is not None:
                    told[f"{name}_seconds"] = round(seconds, 4)
        told["seconds"] = round(time.monotonic() - self.began, 4)
        line = " ".join(f"{name}={_text(value)}" for name, value in told.items())
        what = {"method": self.method, "path": self.path[:100]}
        logger.info("%s %s %s", self.method, json.dumps(self.path[:100])[1:-1], line, extra={"fields": what | told})


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
