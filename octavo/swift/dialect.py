"""How `octavo deploy` speaks: the routes, lengths, model cards, chunks and errors of ms-swift's own server.

`octavo serve` stays OpenAI's; what is not here is the same in both.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError, short
from octavo.log import logger
from octavo.server.answer import Answer
from octavo.server.dialect import Dialect
from octavo.server.failure import Failure
from octavo.server.model import ServedModel
from octavo.server.protocol import SamplingFields
from octavo.server.schema import components
from octavo.server.stream import json_bytes, usage_json

# Lists that its clients send beside the text.
_MEDIA = ("images", "audios", "videos")
# How a completion names a token that is no text by itself.
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")
# What ms-swift counts among bad requests; OpenAI has statuses of their own for these.
_BAD_REQUESTS = {"invalid_api_key", "model_not_found"}


class SwiftFailure(Failure):
    """An error in ms-swift's shape."""

    def body(self) -> bytes:
        return json_bytes({"message": self.message, "object": "error"})


def _content(logprobs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """OpenAI's four lists of a completion, token by token as in a chat."""
    lists = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*lists, strict=True):
        others = [_token(*other) for other in (top or {}).items()]
        yield {**_token(token, logprob), "top_logprobs": others}


def _token(name: str, logprob: float | None) -> dict[str, Any]:
    written = _BYTES.fullmatch(name)
    data = bytes.fromhex(written[1].replace("\\x", "")) if written else name.encode()
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class SwiftDialect(Dialect):
    """`owned_by` is what the model's card says."""

    owned_by: str = "swift"

    def failure(self, error: Exception) -> Failure:
        found = Dialect.failure(self, error)
        status = 400 if found.code in _BAD_REQUESTS else found.status
        return SwiftFailure(status, found.message, found.kind, headers=found.headers)

    def card(self, model: ServedModel, name: str, max_model_len: int) -> dict[str, Any]:
        return {
            "id": name,
            "is_chat": model.is_chat,
            "is_multimodal": False,
            "object": "model",
            "created": model.created,
            "owned_by": self.owned_by,
        }

    def schemas(self) -> dict[str, Any]:
        text, number, flag = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
        shapes = components()
        chunk, logprob = shapes["CompletionChunk"], shapes["TokenLogprob"]
        chunk["properties"]["object"] = {"const": "text_completion.chunk"}
        logprob["properties"]["logprob"] = {"type": ["number", "null"]}
        logprobs = _object({"content": shapes["ChatLogprobs"]["properties"]["content"]})
        card = {"id": text, "is_chat": flag, "is_multimodal": flag, "object": text, "created": number, "owned_by": text}
        return {
            "Error": _object({"message": text, "object": {"const": "error"}}),
            "ModelCard": _object(card),
            "CompletionChunk": chunk,
            "TokenLogprob": logprob,
            "ChatLogprobs": logprobs,
            "CompletionLogprobs": logprobs,
        }

    def check_chat(self, model: ServedModel) -> None:
        if not model.is_chat:
            raise RequestError(f"{model.name} continues texts and knows no turns; use /v1/completions", "messages")

    def check_completion(self, model: ServedModel) -> None:
        if model.is_chat:
            raise RequestError(f"{model.name} answers chats; use /v1/chat/completions", "prompt")

    def chat_tokens(self, asked: int | None, room: int) -> int:
        room = max(1, room)
        if asked is not None and asked > room:
            logger.warning("max_tokens %d is cut to %d, which is what the context has room for", asked, room)
        return room if asked is None else min(asked, room)

    def completion_tokens(self, asked: int | None, room: int) -> int:
        return self.chat_tokens(asked, room)

    def adapt(self, asked: SamplingFields) -> None:
        """`num_beams` asks for a search; lists of pictures and sounds are empty, or refused as unknown."""
        extra = asked.model_extra or {}
        for name in _MEDIA:
            if extra.get(name, ()) in ([], None):
                extra.pop(name, None)
        beams = extra.get("num_beams", 1)
        if beams is not None and (type(beams) is not int or beams < 1):
            raise RequestError(f"num_beams is {short(beams)}; it must be a whole number of at least 1", "num_beams")
        extra.pop("num_beams", None)
        if beams is not None and beams > 1:
            asked.use_beam_search = True
            asked.best_of = beams

    def choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Log probabilities are a list by the name of `content`, on both routes; only two reasons are known."""
        logprobs = choice.get("logprobs")
        if logprobs is not None:
            content = logprobs["content"] if "content" in logprobs else list(_content(logprobs))
            choice = choice | {"logprobs": {"content": content}}
        return choice | {"finish_reason": "stop"} if choice["finish_reason"] == "repetition" else choice

    def chunk_envelope(self, envelope: dict[str, Any]) -> dict[str, Any]:
        return envelope | {"object": envelope["object"].removesuffix(".chunk") + ".chunk"}

    def chunk_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Each delta names the role and has a content, empty at the ends."""
        choice = self.choice(choice)
        if "delta" not in choice:
            return choice
        return choice | {"delta": {"role": "assistant", "content": "", **choice["delta"]}}

    def chunk_usage(self, answer: Answer, include_usage: bool) -> str:
        """The tokens so far, in every chunk."""
        return f',"usage":{json.dumps(usage_json(answer))}'
