"""How `octavo deploy` speaks: the routes, lengths, model cards, chunks and errors of ms-swift's own server.

`octavo serve` stays OpenAI's; what is not here is the same in both.
"""

import json
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError
from octavo.log import logger
from octavo.server.answer import Answer
from octavo.server.dialect import Dialect
from octavo.server.failure import Failure
from octavo.server.model import ServedModel
from octavo.server.schema import components
from octavo.server.stream import json_bytes, usage_json

# What ms-swift counts among bad requests; OpenAI has statuses of their own for these.
_BAD_REQUESTS = {"invalid_api_key", "model_not_found"}


class SwiftFailure(Failure):
    """An error in ms-swift's shape."""

    def body(self) -> bytes:
        return json_bytes({"message": self.message, "object": "error"})


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
        chunk = components()["CompletionChunk"]
        chunk["properties"]["object"] = {"const": "text_completion.chunk"}
        card = {"id": text, "is_chat": flag, "is_multimodal": flag, "object": text, "created": number, "owned_by": text}
        return {
            "Error": _object({"message": text, "object": {"const": "error"}}),
            "ModelCard": _object(card),
            "CompletionChunk": chunk,
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

    def chunk_envelope(self, envelope: dict[str, Any]) -> dict[str, Any]:
        return envelope | {"object": envelope["object"].removesuffix(".chunk") + ".chunk"}

    def chunk_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Each delta names the role and has a content, empty at the ends."""
        if "delta" not in choice:
            return choice
        return choice | {"delta": {"role": "assistant", "content": "", **choice["delta"]}}

    def chunk_usage(self, answer: Answer, include_usage: bool) -> str:
        """The tokens so far, in every chunk."""
        return f',"usage":{json.dumps(usage_json(answer))}'
