"""The server as a process of its own, around an engine that answers at once: `python process.py OPTIONS_AS_JSON`.

For what needs real sockets and signals. The answer spells the prompt's last message; a request whose `user` text holds
"slow" is held back, one that holds "die" ends the engine. `connection` among the options sets that module's bounds.
"""

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from octavo import log
from octavo.config import ServerOptions
from octavo.errors import OctavoError
from octavo.request import Request
from octavo.server import connection
from octavo.server.access import Keys
from octavo.server.metrics import Metrics
from octavo.server.model import ServedModel
from octavo.server.run import listen, serve
from octavo.server.service import Service
from tests.server.double import EngineDouble, byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_ids[0]


class Engine(EngineDouble):
    """Paces its steps while a prompt asks for it, and dies on request."""

    starts = 0

    async def start(self):
        self.starts += 1
        if self.starts > 1 and settings.get("stays_dead"):
            raise OctavoError("no luck")
        return await super().start()

    def _schedule(self) -> None:
        slow = any("slow" in TOKENIZER.decode(request.prompt_token_ids) for request, _ in self._open.values())
        if not self._scheduled and slow:
            self._scheduled = True
            asyncio.get_running_loop().call_later(0.05, self._step)
        super()._schedule()

    def _step(self) -> None:
        for request in self._new:
            if "die" in TOKENIZER.decode(request.prompt_token_ids):
                self._scheduled = False
                self.die("killed by SIGKILL")
                self._new.clear()
                return
        super()._step()


def script(request: Request, index: int) -> list[int]:
    return [*TOKENIZER.encode("Hi, wörld! " * 3), EOS]


settings = json.loads(sys.argv[1])
for name, value in settings.get("connection", {}).items():
    assert hasattr(connection, name)
    setattr(connection, name, value)
options = ServerOptions(port=0, **settings.get("options", {}))
log.setup(lines=options.log_format)
with listen(options) as listener:
    engine = Engine(script, EOS)
    try:
        service = Service(engine, options, Metrics(lambda: engine.stats), keys=Keys.of(options))
        code = asyncio.run(serve(service, lambda: ServedModel("tiny", TOKENIZER), listener, [("files", 0.0)]))
    except OctavoError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        code = 2
    assert "torch" not in sys.modules, "the HTTP process loaded torch"
sys.exit(code)
