"""A tokenizer with the names that users of transformers know, around Octavo's own.

Text that a user of `encode` gives may hold special tokens, as in transformers; keeping a chat's words from forging
them is the template's business.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from octavo.errors import ConfigError
from octavo.text.chat_template import encode_chat
from octavo.text.tokenizer import Tokenizer


class HfTokenizer:
    """`inner` is Octavo's tokenizer; the ids of EOS, BOS and padding can be set, by id or by text."""

    is_multimodal = False

    def __init__(self, inner: Tokenizer, *, name_or_path: str = "", model_max_length: int = 2**31):
        self.inner = inner
        self.name_or_path = name_or_path
        self.model_max_length = model_max_length
        self.bos_token_id: int | None = inner.bos_token_id
        self.eos_token_id: int | None = next(iter(inner.eos_token_ids), None)
        self._pad_token_id: int | None = None

    # ---- text and ids -------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` lets the tokenizer begin with BOS if it is made so."""
        return self.inner.encode(text, add_bos=add_special_tokens)

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of one id or of several."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text` as they are written in the vocabulary."""
        return [str(self.inner.library.id_to_token(index)) for index in self.encode(text, False)]

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, as plain lists."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = self.inner.encode_batch(text, add_bos=add_special_tokens)
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """A chat in the model's own template, as ids or as text."""
        if tokenize:
            return encode_chat(
                self.inner, conversation, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        if self.inner.chat_template is None:
            raise ConfigError(f"the model {self.name_or_path} has no chat template; use octavo.swift.get_template")
        return self.inner.chat_template.render(
            conversation, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    # ---- the vocabulary -----------------------------------------------------------------------------------

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        if isinstance(tokens, str):
            return self.inner.token_id(tokens)
        return [self.inner.token_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        if isinstance(ids, int):
            return self.inner.library.id_to_token(ids)
        return [self.inner.library.id_to_token(index) for index in ids]

    def get_vocab(self) -> dict[str, int]:
        return self.inner.library.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        return self.inner.library.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.inner.vocab_size

    # ---- special tokens -----------------------------------------------------------------------------------

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self.inner.special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.inner.special_ids)

    @property
    def eos_token(self) -> str | None:
        return self._text(self.eos_token_id)

    @eos_token.setter
    def eos_token(self, text: str) -> None:
        self.eos_token_id = self._known(text)

    @property
    def bos_token(self) -> str | None:
        return self._text(self.bos_token_id)

    @bos_token.setter
    def bos_token(self, text: str) -> None:
        self.bos_token_id = self._known(text)

    @property
    def pad_token_id(self) -> int | None:
        """Octavo never pads; EOS stands in, as most code sets it."""
        return self.eos_token_id if self._pad_token_id is None else self._pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, index: int | None) -> None:
        self._pad_token_id = index

    @property
    def pad_token(self) -> str | None:
        return self._text(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, text: str) -> None:
        self._pad_token_id = self._known(text)

    def _text(self, index: int | None) -> str | None:
        return None if index is None else self.inner.token_text(index)

    def _known(self, text: str) -> int:
        index = self.inner.token_id(text)
        if index is None:
            raise ConfigError(f"{text!r} is no token of {self.name_or_path or 'this tokenizer'}; name one that is")
        return index

    def __repr__(self) -> str:
        return f"HfTokenizer({self.name_or_path!r}, {len(self)} tokens, eos {self.eos_token!r})"
