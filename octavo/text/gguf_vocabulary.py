"""A tokenizer of the `tokenizers` library out of a GGUF file's `tokenizer.ggml.*` metadata.

Three kinds exist here: `gpt2` (byte-level BPE with merges, cut as `pre` names it, see `splits`), `llama` (SentencePiece
BPE with scores) and `gemma4` (the same with merges). Source: ggml's docs/gguf.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.errors import CheckpointError
from octavo.log import logger
from octavo.text.splits import SPLITS, guess

# The longest of real vocabularies have some 200; to find a token's merges takes the square of it.
MOST_TOKEN_CHARACTERS = 4096

# Values of tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

# tokenizer.ggml.NAME_token_id -> what templates call that token.
_NAMES = {
    **{name: f"{name}_token" for name in ("bos", "eos", "cls", "mask", "eot", "eom")},
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",  # the format's own spelling
}


def build(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that `metadata` describes;

    raises `CheckpointError` naming `path` when it is of another kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    longest = max(map(len, tokens), default=0)
    if not 0 < longest <= MOST_TOKEN_CHARACTERS:
        raise CheckpointError(f"{path} has {len(tokens)} tokens, the longest of {longest} characters; convert it again")
    types = metadata.get("tokenizer.ggml.token_type")
    if types and len(types) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens, but types of {len(types)}; convert it again")
    for name in ("bos", "eos", "unknown"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise CheckpointError(f"{path} gives {name} as token {index} of {len(tokens)}; convert it again")
    if kind == "gpt2":
        tokenizer, bos = _byte_level(metadata, path)
    elif kind in ("llama", "gemma4"):
        tokenizer, bos = _sentencepiece(metadata, path), True
    else:
        raise CheckpointError(f"{path} has a tokenizer of kind {kind!r}; Octavo reads gpt2, llama and gemma4 here")
    _add_special_tokens(tokenizer, metadata)
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", bos) and bos_id is not None:
        tokenizer.post_processor = _bos_first(tokens[bos_id], bos_id, path)
    return tokenizer


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that the file names, by the names that templates have for them.

    Numbers that are no tokens stand in many files for "none".
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{stored}_token_id") for stored, name in _NAMES.items()}
    return {name: tokens[index] for name, index in ids.items() if type(index) is int and 0 <= index < len(tokens)}


def _bos_first(text: str, index: int, path: Path) -> processors.TemplateProcessing:
    try:
        return processors.TemplateProcessing(single=f"{text}:0 $A:0", special_tokens=[(text, index)])
    except ValueError as error:  # The text is read as part of a pattern.
        raise CheckpointError(f"{path} has a BOS {text!r:.100} that cannot be put first: {error}") from None


def _byte_level(metadata: Mapping[str, Any], path: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer and whether its kind puts BOS first by itself."""
    name = metadata.get("tokenizer.ggml.pre") or _guess(metadata["tokenizer.ggml.tokens"], path)
    if name not in SPLITS:
        raise CheckpointError(
            f"{path} cuts text as {name!r} (tokenizer.ggml.pre), which Octavo does not know; known: {', '.join(SPLITS)}"
        )
    split = SPLITS[name]
    merges = _stored_merges(metadata, path)
    vocabulary = _vocabulary(metadata["tokenizer.ggml.tokens"])
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges)
    except Exception as error:  # The library raises plain Exception for a merge that is not in the vocabulary.
        raise CheckpointError(f"{path} has a tokenizer that does not fit together: {error}") from None
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = split.steps(bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _guess(tokens: list[str], path: Path) -> str:
    """The way to cut of a file that names none, as old ones do."""
    known = guess(frozenset(tokens))
    if known is not None:
        words = "its tokens are those of %s, and text is cut as there"
    else:
        words = (
            "text is cut as for %s, and answers may be worse for it: convert the model again, or name the model's own"
            " tokenizer with --tokenizer"
        )
    logger.warning(f"%s does not say how to cut text (tokenizer.ggml.pre): {words}", path, known or "gpt-2")
    return known or "default"


def _stored_merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{path} has no usable tokenizer.ggml.merges; convert the model again")
    return [(merge[0], merge[-1]) for merge in merges]


def _scored_merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] | None = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{path} has no usable tokenizer.ggml.scores; convert the model again")
    return _merges(tokens, scores, metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens))


def _sentencepiece(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    of_merges = metadata.get("tokenizer.ggml.model") == "gemma4"
    merges = _stored_merges(metadata, path) if of_merges else _scored_merges(metadata, path)
    vocabulary = _vocabulary(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # The library raises plain Exception.
        raise CheckpointError(f"{path} has a tokenizer that does not fit together: {error}") from None
    tokenizer = Tokenizer(model)
    add_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", not of_merges))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if add_space else replace
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece would make them:

    each way to cut a piece, best score first.
    """
    ordinary = {token: index for index, token in enumerate(tokens) if types[index] not in (UNKNOWN, CONTROL, BYTE)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in ordinary.items():
        for cut in range(1, len(token)):
            left, right = ordinary.get(token[:cut]), ordinary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Token text -> id;

    of two equal texts the first keeps it, the others get a text that no input can have.
    """
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in vocabulary:
            token = f"\x00{index}\x00{token}"
        vocabulary[token] = index
    return vocabulary


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens become special; user defined ones are matched in the text but are ordinary output."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    special, plain = [], []
    for index, kind in enumerate(types):
        if kind in (UNKNOWN, CONTROL) and tokens[index]:
            special.append(AddedToken(tokens[index], normalized=False, special=True))
        elif kind == USER_DEFINED and tokens[index]:
            plain.append(AddedToken(tokens[index], normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
