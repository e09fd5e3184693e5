"""Where servers that speak OpenAI's routes differ: which route a model takes, lengths, cards, chunks and errors.

`Dialect` is Octavo's own way, which is OpenAI's. A server that must look like another one overrides what differs;
the endpoints ask and never look at which dialect it is.
"""

from typing import Any

from octavo.server.answer import Answer
from octavo.server.failure import Failure, failure_of
from octavo.server.model import ServedModel
from octavo.server.protocol import SamplingFields

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class Dialect:
    def failure(self, error: Exception) -> Failure:
        """How `error` is told to the client."""
        return failure_of(error)

    def schemas(self) -> dict[str, Any]:
        """Where its answers have other shapes than `schema` has, these, by name."""
        return {}

    def card(self, model: ServedModel, name: str, max_model_len: int) -> dict[str, Any]:
        """The entry in the list of models for one of the model's names."""
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "octavo",
            "max_model_len": max_model_len,
        }

    def check_chat(self, model: ServedModel) -> None:
        """Raises `RequestError` if the chat route is not for `model`."""

    def check_completion(self, model: ServedModel) -> None:
        """Raises `RequestError` if the completions route is not for `model`."""

    def chat_tokens(self, asked: int | None, room: int) -> int:
        """The most tokens of a chat's answer: what was `asked`, or all that the context has `room` for.

        A prompt that is too long leaves no room; it is refused later, with the numbers.
        """
        return max(1, room) if asked is None else asked

    def completion_tokens(self, asked: int | None, room: int) -> int:
        """The most tokens of a completion."""
        return DEFAULT_COMPLETION_TOKENS if asked is None else asked

    def adapt(self, asked: SamplingFields) -> None:
        """Writes fields of its own clients in a request as OpenAI's or vLLM's; before the request is checked."""

    def choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice of a whole answer."""
        return choice

    def chunk_envelope(self, envelope: dict[str, Any]) -> dict[str, Any]:
        """The fields of a streamed chunk before its choices."""
        return envelope

    def chunk_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice of a streamed chunk."""
        return choice

    def chunk_usage(self, answer: Answer, include_usage: bool) -> str:
        """What follows the choices in a chunk, as JSON: empty, or `,"usage":...`."""
        return ',"usage":null' if include_usage else ""
