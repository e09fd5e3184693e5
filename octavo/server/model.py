"""The model as the front knows it: a name, words and defaults. The only module of the server that meets `text`.

Encoding a long text takes the time of many steps, so it leaves the event loop; a short one costs less than the trip.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineOptions, ServerOptions, expanded
from octavo.errors import RequestError
from octavo.models import read_config
from octavo.request import Request
from octavo.sampling_defaults import advised
from octavo.server.off_loop import off_loop
from octavo.server.protocol import ChatMessage, plain_messages
from octavo.text.chat_template import check_variables, encode_chat
from octavo.text.output import RequestText, TextDelta, bad_words_to_ids
from octavo.text.tokenizer import Tokenizer

__all__ = ["RequestText", "ServedModel", "TextDelta", "load_model"]

LONG_TEXT = 16_384  # characters; about 2 ms of encoding
# What a message of a chat, and a prompt, take besides their characters, in characters.
_MESSAGE, _PROMPT = 200, 50
_LOOKED_AT = 8  # characters of a text for each token of the context that are encoded to find it too long


@dataclass(slots=True)
class ServedModel:
    """`name` is what answers tell, and `aliases` are other names by which clients may ask for it.

    `created` is a Unix time in seconds; `sampling_defaults` hold where a request sets nothing.
    """

    name: str
    tokenizer: Tokenizer
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        return [self.name, *self.aliases]

    @property
    def is_chat(self) -> bool:
        """Whether it answers messages, and not only prompts."""
        return self.tokenizer.chat_template is not None

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if len(text) > LONG_TEXT:
            return await off_loop(self.tokenizer.encode, text, add_bos=add_special_tokens)
        return self.tokenizer.encode(text, add_bos=add_special_tokens)

    async def encode_prompts(
        self, prompts: Sequence[str | list[int]], add_special_tokens: bool, max_model_len: int
    ) -> list[list[int]]:
        """Token ids of each prompt; raises `RequestError` for one that is much too long before it is encoded."""

        def encode() -> list[list[int]]:
            made = []
            for prompt in prompts:
                if isinstance(prompt, str):
                    self._check_length((prompt,), max_model_len, "prompt")
                made.append(
                    self.tokenizer.encode(prompt, add_bos=add_special_tokens) if isinstance(prompt, str) else prompt
                )
            return made

        if sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) + _PROMPT * len(prompts) > LONG_TEXT:
            return await off_loop(encode)
        return encode()

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool,
        variables: dict[str, Any],
        max_model_len: int,
    ) -> list[int]:
        """Token ids of a chat, by the model's template; raises `RequestError` if it refuses.

        `variables` are the client's own words to the template. A chat that is much too long is refused before it is
        rendered.
        """
        check_variables(variables)

        def encode() -> list[int]:
            plain = plain_messages(messages)
            self._check_length([message["content"] for message in plain], max_model_len, "messages")
            return self.encode_messages(plain, add_generation_prompt, variables)

        characters = sum(len(message.content or "") for message in messages)
        if characters + _MESSAGE * len(messages) + len(repr(variables)) > LONG_TEXT:
            return await off_loop(encode)
        return encode()

    def encode_messages(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """As `encode_chat`, at once, of messages as templates know them."""
        return encode_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables)

    def _check_length(self, texts: Sequence[str], max_model_len: int, field: str) -> None:
        """Raises `RequestError` if the beginning of `texts` alone fills the context.

        Encoding takes some 200 bytes of memory a character, so a text of megabytes is not encoded just to be counted.
        """
        most = _LOOKED_AT * max_model_len
        if sum(map(len, texts)) <= most:
            return
        count = 0
        for text in texts:
            if most <= 0:
                return
            count += len(self.tokenizer.encode(text[:most], add_bos=False))
            most -= len(text)
            if count > max_model_len:
                raise RequestError(
                    f"{field} of {sum(map(len, texts))} characters are more than the {max_model_len} tokens of this"
                    " context; shorten the prompt or raise --max-model-len",
                    field,
                )

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def text_of(self, request: Request, prompt: str | None) -> RequestText:
        """The text of `request`'s answer, to be fed with its tokens."""
        return RequestText(request, self.tokenizer, prompt)

    async def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of each word."""
        return await off_loop(bad_words_to_ids, self.tokenizer, words) if words else []

    def num_characters(self, token_id: int, skip_special_tokens: bool) -> int:
        """Characters of the text that begin in a token; one that is cut belongs to the token of its first byte."""
        if skip_special_tokens and token_id in self.tokenizer.special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.tokenizer.token_bytes(token_id))


def load_model(options: EngineOptions, server_options: ServerOptions) -> ServedModel:
    """Reads tokenizer, template and defaults; raises `CheckpointError` or `DownloadError`."""
    checkpoint = open_checkpoint(options.model, hub=options.hub, revision=options.revision, weights=False)
    if options.tokenizer:
        tokenizer = Tokenizer.load(options.tokenizer, hub=options.hub, revision=options.revision)
    else:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokenizer.check_vocabulary(read_config(checkpoint.config).vocab_size)
    defaults = advised(checkpoint.generation_config) if options.generation_config == "auto" else {}
    name, *aliases = dict.fromkeys(server_options.served_model_name or [name_of(options.model)])
    return ServedModel(name, tokenizer, defaults, aliases=aliases)


def name_of(model: str) -> str:
    """The name that clients use for `model`: a known name as it is, else the folder's or the file's."""
    path = expanded(model)
    if not path.exists():
        return model
    path = path.resolve()
    return path.name if path.is_dir() else path.stem
