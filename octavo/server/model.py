"""The model as the front knows it: a name, words and defaults. The only module of the server that meets `text`.

Encoding a long text takes the time of many steps, so it leaves the event loop; a short one costs less than the trip.
"""

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineOptions, ServerOptions
from octavo.errors import RequestError
from octavo.models import read_config
from octavo.request import Request
from octavo.text.chat_template import encode_chat
from octavo.text.output import RequestText, TextDelta, bad_words_to_ids
from octavo.text.tokenizer import Tokenizer

__all__ = ["RequestText", "ServedModel", "TextDelta", "load_model"]

LONG_TEXT = 16_384  # characters; about 2 ms of encoding
# Sampling defaults that a model's generation_config.json may set, as vLLM's users expect.
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What `encode_chat` takes besides the template's variables.
_RESERVED = frozenset(inspect.signature(encode_chat).parameters) - {"variables"}


@dataclass(slots=True)
class ServedModel:
    """`created` is a Unix time in seconds; `sampling_defaults` hold where a request sets nothing."""

    name: str
    tokenizer: Tokenizer
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether it answers messages, and not only prompts."""
        return self.tokenizer.chat_template is not None

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt."""
        if len(text) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_bos=add_special_tokens)
        return self.tokenizer.encode(text, add_bos=add_special_tokens)

    async def encode_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """Token ids of a chat, by the model's template; raises `RequestError` if it refuses.

        `variables` are the client's own words to the template.
        """
        for name in variables.keys() & _RESERVED:
            field = f"chat_template_kwargs.{name}"
            raise RequestError(f"{field} cannot be set: it is not for clients, or has its own field", field)

        def encode() -> list[int]:
            return encode_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables)

        if sum(len(message["content"]) for message in messages) > LONG_TEXT:
            return await asyncio.to_thread(encode)
        return encode()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def text_of(self, request: Request, prompt: str | None) -> RequestText:
        """The text of `request`'s answer, to be fed with its tokens."""
        return RequestText(request, self.tokenizer, prompt)

    def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        return bad_words_to_ids(self.tokenizer, words) if words else []

    def num_characters(self, token_id: int, skip_special_tokens: bool) -> int:
        """Characters of the text that begin in a token; one that is cut belongs to the token of its first byte."""
        if skip_special_tokens and token_id in self.tokenizer.special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.tokenizer.token_bytes(token_id))


def load_model(options: EngineOptions, server_options: ServerOptions) -> ServedModel:
    """Reads tokenizer, template and defaults; raises `CheckpointError` or `DownloadError`."""
    checkpoint = open_checkpoint(options.model, hub=options.hub, revision=options.revision, weights=False)
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else Tokenizer.from_checkpoint(checkpoint)
    tokenizer.check_vocabulary(read_config(checkpoint.config).vocab_size)
    generation = checkpoint.generation_config
    defaults = {name: generation[name] for name in _DEFAULTS if generation.get(name) is not None}
    return ServedModel(server_options.served_model_name or name_of(options.model), tokenizer, defaults)


def name_of(model: str) -> str:
    """The name that clients use for `model`: a known name as it is, else the folder's or the file's."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    path = path.resolve()
    return path.name if path.is_dir() else path.stem
