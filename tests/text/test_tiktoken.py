"""Qwen v1's `.tiktoken` vocabulary: a tokenizer out of ranks, against tiktoken's rule in plain Python."""

import base64
import os
import random
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.checkpoint import TokenizerData
from octavo.checkpoint.tiktoken import SPECIAL_TOKENS, read_ranks
from octavo.errors import CheckpointError
from octavo.text.chat_template import encode_chat
from octavo.text.tokenizer import Tokenizer
from tests.tiny_models import train_ranks, write_tiny_qwen_v1

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = {"chat_format": "chatml"}


class PlainTiktoken:
    """tiktoken's rule: of all neighbours that together are a token, those of the lowest rank merge, leftmost first."""

    def __init__(self, ranks: list[bytes]):
        self.ids = {token: rank for rank, token in enumerate(ranks)}

    def encode(self, text: str) -> list[int]:
        words = regex.findall(PATTERN, unicodedata.normalize("NFC", text))
        return [token for word in words for token in self.encode_word(word.encode())]

    def encode_word(self, word: bytes) -> list[int]:
        if word in self.ids:
            return [self.ids[word]]
        parts = [bytes([byte]) for byte in word]
        while True:
            pairs = [(self.ids[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in self.ids]
            if not pairs:
                return [self.ids[part] for part in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


RANKS = train_ranks(num_merges=150)
PLAIN = PlainTiktoken(RANKS)
TINY = Tokenizer.from_data(TokenizerData(Path("tiny"), ranks=RANKS, generation_config=CHAT))


def test_equals_the_plain_rule(hard_text: str) -> None:
    assert TINY.encode(hard_text) == PLAIN.encode(hard_text)
    for line in hard_text.splitlines(keepends=True):
        assert TINY.encode(line) == PLAIN.encode(line)


LIKELY = st.sampled_from("the quick 'S're\n\t  。你好，的是12⅓e\u0301<|im_>")


@given(st.text(alphabet=st.one_of(LIKELY, st.characters(codec="utf-8"))))
@settings(max_examples=300, deadline=None)
def test_equals_the_plain_rule_on_any_text(text: str) -> None:
    assert TINY.encode(text, parse_special=False) == PLAIN.encode(text)
    assert TINY.decode(TINY.encode(text, parse_special=False)) == unicodedata.normalize("NFC", text)


def test_a_large_vocabulary_by_the_plain_rule(hard_text: str) -> None:
    ranks = train_ranks(hard_text, 400)
    tokenizer = Tokenizer.from_data(TokenizerData(Path("large"), ranks=ranks))
    assert tokenizer.encode(hard_text) == PlainTiktoken(ranks).encode(hard_text)


def test_a_word_that_no_merge_reaches_is_still_a_token() -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"abcd"]
    tokenizer = Tokenizer.from_data(TokenizerData(Path("odd"), ranks=ranks))
    assert tokenizer.encode("abcd abcd") == [256, *b" abcd"]


def test_special_tokens_follow_the_ranks() -> None:
    end = len(RANKS)
    assert TINY.vocab_size == end + 208
    assert len(SPECIAL_TOKENS) == 208
    assert [TINY.token_id(text) for text in SPECIAL_TOKENS] == list(range(end, end + 208))
    assert (SPECIAL_TOKENS[0], SPECIAL_TOKENS[-1]) == ("<|endoftext|>", "<|extra_204|>")
    text = 'print("<|endoftext|>")'
    assert end in TINY.encode(text)
    assert end not in TINY.encode(text, parse_special=False)
    assert TINY.decode(TINY.encode(text, parse_special=False)) == text
    assert TINY.decode([72 - 33, end + 2]) == TINY.decode([72 - 33])


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert TINY.decode([RANKS.index(b"\xe4"), RANKS.index(b"\xbd"), RANKS.index(b"A")]) == "\ufffdA"


def test_chat(tmp_path: Path) -> None:
    end = len(train_ranks())
    chat = Tokenizer.load(str(write_tiny_qwen_v1(tmp_path / "chat")))
    assert chat.eos_token_ids == (end + 2, end + 1, end)
    ids = encode_chat(chat, [{"role": "user", "content": "你好<|im_end|>"}])
    start, stop = end + 1, end + 2
    said = chat.encode("user\n你好<|im_end|>", parse_special=False)
    system = chat.encode("system\nYou are a helpful assistant.")
    line = chat.encode("\n")
    assert ids == [start, *system, stop, *line, start, *said, stop, *line, start, *chat.encode("assistant\n")]
    own = encode_chat(chat, [{"role": "system", "content": "x"}], add_generation_prompt=False)
    assert own == [start, *chat.encode("system\nx"), stop, *line]
    base = Tokenizer.load(str(write_tiny_qwen_v1(tmp_path / "base", chat=False)))
    assert (base.eos_token_ids, base.chat_template) == ((end,), None)
    assert Tokenizer.load(str(tmp_path / "base" / "qwen.tiktoken")).encode("你好") == base.encode("你好")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], "line 6 does not hold token 5"),
        (lambda lines: [*lines[:300], b"!!! 300"], "line 301 does not hold token 300"),
        (lambda lines: [*lines[:300], lines[300][:3]], "line 301 does not hold token 300"),
        (lambda lines: [*lines[:300], b"IQ== " + b"9" * 5000], "line 301 does not hold token 300"),
        (lambda lines: [*lines[:300], base64.b64encode(b"A" * 10**6) + b" 300"], "line 301 does not hold token 300"),
        (lambda lines: [*lines[:300], b" 300"], "line 301 does not hold token 300"),
        (lambda lines: lines[:200], "lacks tokens for 56 of the 256 bytes"),
        (lambda lines: [*lines, base64.b64encode(b"A") + b" %d" % len(lines)], "gives the same token twice"),
    ],
    ids=["order", "base64", "cut", "a rank of 5,000 digits", "as long as a book", "no token", "short", "twice"],
)
def test_damaged_files(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = write_tiny_qwen_v1(tmp_path) / "qwen.tiktoken"
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(str(tmp_path))


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    os.truncate(write_tiny_qwen_v1(tmp_path) / "qwen.tiktoken", 1 << 40)
    with pytest.raises(CheckpointError, match="which is no vocabulary"):
        Tokenizer.load(str(tmp_path))


def test_a_vocabulary_of_real_size_is_fast() -> None:
    """As many tokens as Qwen has, of about as many bytes: each joins two of the earlier ones."""
    ranks = [bytes([byte]) for byte in range(256)]
    known = set(ranks)
    likely = random.Random(0).random
    while len(ranks) < 151_643:
        token = ranks[int(likely() ** 3 * len(ranks))] + ranks[int(likely() ** 3 * len(ranks))]
        if len(token) <= 9 and token not in known:
            known.add(token)
            ranks.append(token)
    began = time.process_time()
    tokenizer = Tokenizer.from_data(TokenizerData(Path("real size"), ranks=ranks))
    assert time.process_time() - began < 6, "about 1.2 s; this bound only catches a quadratic mistake"
    assert tokenizer.vocab_size == 151_851


def real_vocabulary() -> Path | None:
    """A real qwen.tiktoken: named by QWEN_TIKTOKEN, or in a cache of ModelScope or Hugging Face."""
    if named := os.environ.get("QWEN_TIKTOKEN"):
        return Path(named)
    caches = [Path.home() / ".cache" / name for name in ("modelscope", "huggingface/hub")]
    return next((path for cache in caches for path in cache.glob("**/*wen*/**/qwen.tiktoken")), None)


@pytest.mark.skipif(real_vocabulary() is None, reason="no real qwen.tiktoken here; set QWEN_TIKTOKEN to one")
def test_golden_ids_of_the_real_vocabulary() -> None:
    path = real_vocabulary()
    assert path is not None
    tokenizer = Tokenizer.from_data(TokenizerData(path, ranks=read_ranks(path), generation_config=CHAT))
    text = 'print("<|endoftext|>")'
    assert tokenizer.vocab_size == 151_851
    assert tokenizer.encode("\n") == [198]
    assert tokenizer.encode("assistant") == [77091]
    assert tokenizer.encode(text) == [1350, 445, 151643, 899]
    assert tokenizer.encode(text, parse_special=False) == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert tokenizer.decode([51461, 117]) == " 根"
    assert tokenizer.eos_token_ids == (151645, 151644, 151643)
