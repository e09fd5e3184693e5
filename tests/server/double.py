"""An engine that answers at once, for tests of the front and for its benchmark: no process, no model.

`EngineDouble` is a real `EngineClient` up to the pipe: the same streams, limits and bookkeeping, but what would be
sent to the engine process is answered from the event loop, one token a step for every open sequence.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from octavo.config import EngineOptions
from octavo.engine.info import EngineInfo
from octavo.engine.limits import Limits
from octavo.engine.process import EngineClient
from octavo.engine.state import StepOutput
from octavo.metrics import EngineStats
from octavo.request import Request, TokenLogprobs, TokenOutput
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}{{ mood or '' }}"
)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are single bytes (in the library's order), and <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    end = library.token_to_id("</s>")
    return Tokenizer(library, eos_token_ids=[end], chat_template=ChatTemplate(TEMPLATE))


class EngineDouble(EngineClient):
    """`script` gives the token ids of sample `index` of a request, which must reach `eos` or the request's max_tokens.

    While `held` is True no step is made. `steps` counts; `aborted` lists what the engine was told to abort.
    """

    def __init__(self, script: Callable[[Request, int], list[int]], eos: int, **settings: Any):
        limits = {"vocab_size": 258, "max_model_len": 512, "max_num_seqs": 64, "num_blocks": 64, "block_size": 16}
        names = {name: settings.pop(name) for name in list(settings) if name in limits}
        super().__init__(EngineOptions(), **settings)
        self.limits = Limits(**(limits | names))
        self.script = script
        self.eos = eos
        self.held = False
        self.steps = 0
        self.aborted: list[tuple[str, int | None]] = []
        self.failure: str | None = None
        self._open: dict[tuple[str, int], tuple[Request, list[int]]] = {}
        self._drawn: dict[tuple[str, int], int] = {}
        self._new: list[Request] = []
        self._scheduled = False

    async def start(self) -> EngineInfo:
        self._channel = object()  # type: ignore[assignment]
        self.failure = None
        self.info = EngineInfo(self.limits, "double", "float32", ["a plan"], [("engine ready", 0.0)])
        return self.info

    def trouble(self, stall_timeout: float) -> str | None:
        return self.failure if self.info is not None else self.failure or "the engine is not running"

    def die(self, reason: str) -> None:
        """What `EngineClient` does when the process ends."""
        self.failure, self.info, self._channel = f"the engine stopped: {reason}", None, None
        self._open.clear()
        self._fail_all(self.failure)
        self.on_death(reason)

    async def close(self) -> None:
        self._fail_all("the server is shutting down")
        self.info = self._channel = None

    def release(self) -> None:
        self.held = False
        self._schedule()

    def _send(self, message: tuple[Any, ...]) -> int:
        if message[0] == "add":
            self._new.append(message[1])
            self._schedule()
            asyncio.get_running_loop().call_soon(self._confirm)
        elif message[0] == "abort":
            self.aborted.append(message[1:])
            for key in list(self._open):
                if key[0] == message[1] and message[2] in (None, key[1]):
                    del self._open[key]
        self._count()
        return 0

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._scheduled = False
        if self.held:
            return
        output = StepOutput(tokens=[])
        for request in self._new:
            output.started.append((request.request_id, time.monotonic() - request.arrival, 0))
            if request.params.prompt_logprobs is not None:
                entries = [logprobs_of(token, request.params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
                output.prompt_logprobs.append((request.request_id, 0, entries))
            for index in range(request.params.n):
                if request.params.beams:
                    output.beam_scores.append((request.request_id, index, -2.0 - index, -1.0 - index))
                self._open[request.request_id, index] = (request, self.script(request, index))
        self._new.clear()
        for key in list(self._open):
            output.tokens.append(self._token(key))
            # The answers of a beam search come whole.
            while key in self._open and self._open[key][0].params.beams:
                output.tokens.append(self._token(key))
        self.steps += 1
        self._count()
        self._deliver(output)
        if self._open:
            self._schedule()

    def _token(self, key: tuple[str, int]) -> TokenOutput:
        request, left = self._open[key]
        token, params = left.pop(0), request.params
        self._drawn[key] = self._drawn.get(key, 0) + 1
        reason = "stop" if token == self.eos else "length" if self._drawn[key] == params.max_tokens else None
        if reason is not None:
            del self._open[key], self._drawn[key]
        return (*key, token, reason, None, None if params.logprobs is None else logprobs_of(token, params.logprobs))

    def _count(self) -> None:
        self.stats = EngineStats(running=len(self._open), blocks_owned=len(self._open), steps=self.steps)


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    """The drawn token is the most likely one; the next ids follow it."""
    others = [token, *((token + i) % 256 for i in range(1, count))][:count]
    return [token, *others], [-0.5, *(-0.5 * (i + 1) for i in range(len(others)))], 1
