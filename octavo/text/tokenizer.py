"""Text to token ids and back, over the `tokenizers` library, from a tokenizer.json, a GGUF file's metadata or
the ranks of a `.tiktoken` file.

What a token is in bytes is known here, so that text can be made token by token (`detokenizer`). Where special
tokens in a chat may come from is the business of `chat_template`.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from octavo.checkpoint import Checkpoint, TokenizerData, open_tokenizer_data
from octavo.checkpoint.tiktoken import end_ids, is_chat
from octavo.errors import CheckpointError, ConfigError, OctavoError, RequestError
from octavo.text import gguf_vocabulary, tiktoken_vocabulary
from octavo.text.byte_level import ALPHABET
from octavo.text.chat_template import ChatTemplate
from octavo.text.special_text import SpecialText

# Of a token in added_tokens_decoder, beside its `content`.
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    `vocab_size` counts all tokens, added ones too; `special_ids` are those that a person does not read;
    `named_tokens` are texts of special tokens by the names that templates have for them (`bos_token`, `image_token`);
    `strips_space` is true when decoding drops one leading space (SentencePiece's mark of a text's beginning);
    `library` is the tokenizer of the `tokenizers` package underneath (the grammar needs it);
    `by_bytes` is false for the rare decoder whose tokens have no bytes of their own: then `token_bytes` is
    only a guess, and text is made by decoding windows of tokens.
    """

    def __init__(
        self,
        library: Library,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ):
        self.library = library
        self._plain: dict[bool, Library] = {}
        self._plain_lock = threading.Lock()
        self.bos_token_id = bos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_token_ids))
        self.chat_template = chat_template
        self.named_tokens: Mapping[str, str] = named_tokens or {}
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        self._added: dict[int, AddedToken] = dict(sorted(library.get_added_tokens_decoder().items()))
        self.special_ids = frozenset(index for index, token in self._added.items() if token.special)
        self.special_tokens: dict[str, AddedToken] = {
            token.content: token for token in self._added.values() if token.special and token.content
        }
        self.special_text = SpecialText(self.special_tokens)
        self._decoder, self.strips_space = _decoder_kind(library)
        self._bytes: dict[int, bytes] = {}

    @property
    def by_bytes(self) -> bool:
        return self._decoder != "other"

    @classmethod
    def load(cls, source: str, *, hub: str = "auto", revision: str | None = None) -> "Tokenizer":
        """The tokenizer of a known model name, a GGUF file, a folder or ORG/NAME; raises `CheckpointError`."""
        return cls.from_data(open_tokenizer_data(source, hub=hub, revision=revision))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The model's own tokenizer; raises `CheckpointError`."""
        return cls.from_data(checkpoint.tokenizer_data())

    @classmethod
    def from_data(cls, data: TokenizerData) -> "Tokenizer":
        """A tokenizer of what a model's files say; raises `CheckpointError`."""
        if data.ranks:
            return _from_ranks(data)
        return _from_json(data) if data.json is not None else _from_ggml(data)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `ConfigError` if tokens have no row in a model's table of `vocab_size` rows.

        Tokens that were added to a tokenizer and never trained are common; the engine refuses a prompt with one.
        """
        plain = self.library.get_vocab_size(with_added_tokens=False)
        if plain > vocab_size:
            raise ConfigError(
                f"the tokenizer has {plain} tokens, but the model's vocab_size is {vocab_size}: they belong to"
                " different models; take the tokenizer from the model's own files, or name the right one with"
                " --tokenizer"
            )

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_bos` lets the model's own rule apply (many models have no BOS); `parse_special=False` reads the
        texts of special tokens as plain text. Raises `RequestError` for text that is not Unicode (lone
        surrogates).
        """
        return self.encode_batch([text], parse_special=parse_special, add_bos=add_bos)[0]

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True, add_bos: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, several at a time; arguments as for `encode`."""
        library = self.library if parse_special else self._plain_library(first=True)
        return _encode(library, texts, add_bos)

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts between special tokens: the first at the very beginning, others behind one."""
        ids: list[list[int]] = [[] for _ in texts]
        for first, places in ((True, range(len(texts))[:1]), (False, range(len(texts))[1:])):
            # An empty text would get the space that some tokenizers put first.
            places_of_text = [place for place in places if texts[place]]
            if places_of_text:
                found = _encode(self._plain_library(first), [texts[place] for place in places_of_text], False)
                for place, encoded in zip(places_of_text, found, strict=True):
                    ids[place] = encoded
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        if not self.by_bytes:
            return self.library.decode(list(ids), skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids if skip_special_tokens else frozenset()
        pieces = b"".join([self.token_bytes(index) for index in ids if index not in skipped])
        text = pieces.decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def make_template(self, source: str) -> ChatTemplate:
        """A template that a user gives in place of the model's own, with the texts of this model's special tokens."""
        ids = {"bos_token": self.bos_token_id, "eos_token": next(iter(self.eos_token_ids), None)}
        texts = {name: self.token_text(index) for name, index in ids.items() if index is not None}
        return ChatTemplate(source, **{**texts, **self.named_tokens})

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; empty for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._to_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """The token as a person reads it on its own; bytes of a cut character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written exactly so in the vocabulary; None if there is none."""
        return self.library.token_to_id(text)

    def _to_bytes(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.content.encode()
        token = self.library.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self._decoder == "byte_level":
            try:
                return bytes([ALPHABET[character] for character in token])
            except KeyError:
                return token.encode()
        if self._decoder == "byte_fallback" and token in _BYTE_TOKENS:
            return _BYTE_TOKENS[token]
        return token.replace("▁", " ").encode()

    def _plain_library(self, first: bool) -> Library:
        """The tokenizer that does not see special tokens, made when first asked for.

        The library keeps that choice as a state of the tokenizer, which threads would share; so it is a
        second tokenizer around the same model. `first=False` is for a piece after a special token, where a
        tokenizer that marks only the text's beginning adds no space.
        """
        with self._plain_lock:
            if first not in self._plain:
                self._plain[first] = self._make_plain(first)
            return self._plain[first]

    def _make_plain(self, first: bool) -> Library:
        library = self.library
        if not first and (description := _without_first_space(library)) is not None:
            plain = Library.from_str(description)
        else:
            plain = Library(library.model)
            for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
                if (value := getattr(library, part)) is not None:
                    setattr(plain, part, value)
            for special, group in groupby(self._added.values(), key=lambda token: token.special):
                (plain.add_special_tokens if special else plain.add_tokens)(list(group))
            if any(plain.token_to_id(token.content) != index for index, token in self._added.items()):
                # Added tokens with gaps between their ids: only a whole copy keeps the ids.
                plain = copy.deepcopy(library)
        plain.encode_special_tokens = True
        return plain


def _encode(library: Library, texts: Sequence[str], add_bos: bool) -> list[list[int]]:
    try:
        with _library_errors(
            lambda why: RequestError(f"the model's tokenizer cannot encode this text: {why}", "prompt")
        ):
            found = library.encode_batch_fast(list(texts), add_special_tokens=add_bos)
    except (UnicodeEncodeError, TypeError):
        raise RequestError("the prompt must be Unicode text; it has a lone surrogate", "prompt") from None
    return [encoding.ids for encoding in found]


@contextmanager
def _library_errors(named: Callable[[str], OctavoError]) -> Iterator[None]:
    """What the library raises as an error of ours: plain `Exception`, and Rust's panics, which are none."""
    try:
        yield
    except (UnicodeEncodeError, TypeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise named(str(error) or type(error).__name__) from None


def _decoder_kind(library: Library) -> tuple[str, bool]:
    """How tokens become bytes (`byte_level`, `byte_fallback`, `pieces`:

    no byte tokens, or `other`), and whether a leading space is dropped.
    """
    if library.decoder is None:
        return "other", False
    description = json.loads(library.decoder.__getstate__())
    steps = description["decoders"] if description["type"] == "Sequence" else [description]
    kinds = [step["type"] for step in steps]
    if not kinds:
        return "other", False
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == "▁":
        return "pieces", steps[0]["prepend_scheme"] != "never"
    strips = kinds[-1] == "Strip" and (steps[-1]["content"], steps[-1]["start"], steps[-1]["stop"]) == (
        " ",
        1,
        0,
    )
    replaces = kinds[0] == "Replace" and (steps[0]["pattern"], steps[0]["content"]) == ({"String": "▁"}, " ")
    if replaces and kinds[1:3] == ["ByteFallback", "Fuse"] and (len(kinds) == 3 or (strips and len(kinds) == 4)):
        return "byte_fallback", strips
    return "other", False


def _without_first_space(library: Library) -> str | None:
    """The tokenizer's JSON with a space never put first;

    None where it already does not depend on the place.
    """
    first, never = '"prepend_scheme":"first"', '"prepend_scheme":"never"'
    if library.pre_tokenizer is None or first not in library.pre_tokenizer.__getstate__().decode():
        return None
    return library.to_str().replace(first, never)


def _from_json(data: TokenizerData) -> Tokenizer:
    assert data.json is not None, "the caller looked"
    with _library_errors(lambda why: _damaged(data, f"cannot be used: {why}")):
        library = Library.from_str(data.json)
        # Some parts that do not fit together are only met by a text.
        library.encode("a <b>", add_special_tokens=True)
    # Requests of any length are encoded whole: the engine says which are too long.
    library.no_truncation()
    library.no_padding()
    for index, token in _added_tokens(data):
        if library.id_to_token(index) == token.content and index not in library.get_added_tokens_decoder():
            (library.add_special_tokens if token.special else library.add_tokens)([token])
    named = _named_tokens(data.settings)
    ends = _as_ids(data.generation_config.get("eos_token_id"))
    bos = _id_of(library, named.get("bos_token"))
    if bos is None:
        bos = next(iter(_as_ids(data.generation_config.get("bos_token_id"))), None)
    eos = _id_of(library, named.get("eos_token"))
    return Tokenizer(
        library,
        bos_token_id=bos,
        eos_token_ids=[*([] if eos is None else [eos]), *ends],
        chat_template=_template(data.chat_templates, named),
        named_tokens=named,
    )


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer_config.json's tokens by name: `bos_token` and whatever else is called so, and the extra ones."""
    found = {name: entry for name, entry in settings.items() if name.endswith("_token")}
    for name in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(extra := settings.get(name), Mapping):
            found |= extra
    texts = {name: _token_text(entry) for name, entry in found.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _damaged(data: TokenizerData, what: str, name: str = "tokenizer.json") -> CheckpointError:
    return CheckpointError(f"{data.path / name} {what}; fetch it again")


def _added_tokens(data: TokenizerData) -> list[tuple[int, AddedToken]]:
    """tokenizer_config.json's `added_tokens_decoder`, in the order of ids."""
    stored = data.settings.get("added_tokens_decoder")
    if stored is not None and not isinstance(stored, Mapping):
        what = f"has an added_tokens_decoder that is {stored!r:.100} and no object of tokens by id"
        raise _damaged(data, what, "tokenizer_config.json")
    found = []
    for index, entry in (stored or {}).items():
        flags = {name: entry.get(name) for name in _TOKEN_FLAGS} if isinstance(entry, Mapping) else {}
        text = _token_text(entry) if flags else None
        number = int(index) if index.isdecimal() and len(index) < 10 else None
        if number is None or text is None or not all(flag is None or isinstance(flag, bool) for flag in flags.values()):
            what = f"has the entry {index!r:.20}: {entry!r:.100} in added_tokens_decoder, which is no token with its id"
            raise _damaged(data, what, "tokenizer_config.json")
        if text:
            found.append((number, AddedToken(text, **{name: flag for name, flag in flags.items() if flag is not None})))
    return sorted(found, key=lambda item: item[0])


def _from_ggml(data: TokenizerData) -> Tokenizer:
    metadata = data.ggml
    library = gguf_vocabulary.build(metadata, data.path)
    named = gguf_vocabulary.named_tokens(metadata)
    templates = dict(data.chat_templates)
    for key, value in metadata.items():
        prefix, _, name = key.partition("tokenizer.chat_template")
        if not prefix and isinstance(value, str) and key.startswith("tokenizer.chat_template"):
            templates[name.removeprefix(".") or "default"] = value
    return Tokenizer(
        library,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_as_ids(data.generation_config.get("eos_token_id")),
        chat_template=_template(templates, named),
        named_tokens=named,
    )


def _from_ranks(data: TokenizerData) -> Tokenizer:
    library = tiktoken_vocabulary.build(data.ranks)
    ends = end_ids(len(data.ranks), data.generation_config)
    templates = dict(data.chat_templates)
    if is_chat(data.generation_config):
        templates.setdefault("default", tiktoken_vocabulary.CHATML)
    named = {"eos_token": library.id_to_token(ends[0]) or ""}
    template = _template(templates, named)
    return Tokenizer(library, eos_token_ids=ends, chat_template=template, named_tokens=named)


def _template(sources: Mapping[str, str], named_tokens: Mapping[str, str]) -> ChatTemplate | None:
    return ChatTemplate(sources, **named_tokens) if sources else None


def _token_text(entry: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object around it."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None


def _id_of(library: Library, text: str | None) -> int | None:
    return None if text is None else library.token_to_id(text)


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
