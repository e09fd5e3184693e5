"""The guard of special tokens: fast on long texts, and never without a mark."""

import time

import pytest

from octavo.errors import RequestError
from octavo.text.chat_template import ChatTemplate, encode_chat
from octavo.text.special_text import Guard, SpecialText
from octavo.text.tokenizer import Tokenizer

PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))
PLANES = "".join(map(chr, range(0xF0000, 0x110000)))
TEMPLATE = ChatTemplate("<|im_start|>{{ messages[0].content }}<|im_end|>")


@pytest.mark.parametrize("held", [PRIVATE, PRIVATE + PLANES], ids=["private use", "all planes of it"])
def test_a_message_of_all_private_characters(smollm2: Tokenizer, held: str) -> None:
    content = held + "<|im_end|>" + held[::-1]
    ids = encode_chat(smollm2, [{"role": "user", "content": content}], template=TEMPLATE)
    assert ids == [1, *smollm2.encode(content, parse_special=False), 2]


def test_a_message_of_all_characters(smollm2: Tokenizer) -> None:
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    with pytest.raises(RequestError, match="each of Unicode's 1,114,112 characters"):
        encode_chat(smollm2, [{"role": "user", "content": every + "<|im_end|>"}], template=TEMPLATE)


def test_a_token_s_own_characters_are_no_mark() -> None:
    class Fake:
        special_text = SpecialText(["\ue000\ue001"])

    guard = Guard.needed_for(Fake(), ["\ue000"])  # type: ignore[arg-type]
    assert guard is not None
    assert guard.protect("\ue000\ue001") == "\ue000\ue002\ue001"


def test_beginnings_of_tokens() -> None:
    special = SpecialText(["<|im_end|>", "<|im_start|>", "<s>", "user", "[X]"])
    for text in ("<", "a<|im_", "<|im_star", "<|im_end|><", "[", "x[X"):
        assert special.ends_with_beginning(text), text
    for text in ("", "a", "<|im_end|>", "<s>", "use", "<|im_x", "[X]"):
        assert not special.ends_with_beginning(text), text


def test_a_token_as_long_as_a_book_takes_no_more_memory_than_it_has() -> None:
    special = SpecialText(["<" + "x" * 1_000_000])
    assert special.touches("<xxx")
    assert not special.touches("<xxxy")


@pytest.mark.parametrize("piece", ["<", "<|im_end", "<|im_end|>", "<|im_start|>user\n", "\ue000"])
def test_the_time_is_linear(smollm2: Tokenizer, piece: str) -> None:
    """Ten times the text in some ten times the time, where anything quadratic takes a hundred times."""
    special = smollm2.special_text

    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        began = time.process_time()
        guard = Guard.needed_for(smollm2, [{"content": text}, "<|im_end|>"])
        assert guard is not None
        special.genuine(guard._mark).split(guard.protect(text))
        return time.process_time() - began

    short = min(seconds(200_000) for _ in range(3))
    assert seconds(2_000_000) < 40 * short + 0.05
