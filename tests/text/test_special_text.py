"""Where special tokens are in a text: fast on long texts, of any characters, with any number of tokens."""

import time

import pytest

from octavo.text.chat_template import ChatTemplate, encode_chat
from octavo.text.origin import foreign, joined, own
from octavo.text.special_text import SpecialText, encode_traced
from octavo.text.tokenizer import Tokenizer

TEMPLATE = ChatTemplate("<|im_start|>{{ messages[0].content }}<|im_end|>")


def found(special: SpecialText, text: str) -> list[str]:
    return [match[0] for match in special.own(text)]


def test_a_message_of_all_characters(smollm2: Tokenizer) -> None:
    content = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])) + "<|im_end|>"
    ids = encode_chat(smollm2, [{"role": "user", "content": content}], template=TEMPLATE)
    assert ids == [1, *smollm2.encode(content, parse_special=False), 2]


def test_beginnings_of_tokens() -> None:
    special = SpecialText(["<|im_end|>", "<|im_start|>", "<s>", "user", "[X]"])
    for text in ("<", "a<|im_", "<|im_star", "<|im_end|><", "[", "x[X", "use"):
        assert special.ends_with_beginning(text), text
    for text in ("", "a", "<|im_end|>", "<s>", "sure", "<|im_x", "[X]"):
        assert not special.ends_with_beginning(text), text


def test_what_others_may_begin() -> None:
    special = SpecialText(["<|im_end|>", "[X]"])
    for value in ("a<b", ["a", {"b": ("[",)}], {"<": 1}, {1, 2}, object()):
        assert special.could_begin_in(value), value
    for value in ("", "a|im_end|>]", None, 1, 2.5, True, [{"a": None}]):
        assert not special.could_begin_in(value), value
    assert not SpecialText([]).could_begin_in("<")


def test_what_a_template_may_begin() -> None:
    special = SpecialText(["<|im_end|>", "[X]"])
    for text in ("<", "a <|", "<|%s|>", "<%(a)5s>", "<|{}", "[{x!r:>4}]", "<|role|>", "<|im_end|><|"):
        assert special.could_end_elsewhere(["a", text]), text
    for text in ("<|im_end|>", "<b>", "[X]", "%s<b>", "{}|im_end|>", "<b|im_end|>|", "[1]", "[XX]"):
        assert not special.could_end_elsewhere(["a", text]), text


def test_the_longest_token_at_a_place_in_a_run() -> None:
    special = SpecialText(["<a>", "<a><b>", "<a><b><c>", "x", "xy", "(", "[^]", "."])
    assert found(special, own("<a><b><c><a><b>z<a>")) == ["<a><b><c>", "<a><b>", "<a>"]
    assert found(special, own("xxyxz([^]..")) == ["x", "xy", "x", "(", "[^]", ".", "."]
    assert found(special, joined([own("<a>"), "<b>", own("<a><b>"), "<c>"])) == ["<a>", "<a><b>"]
    assert found(special, joined([own("<a"), ">", own("x"), "y"])) == ["x"]
    assert found(special, "<a>") == found(special, foreign("<a>")) == []


@pytest.mark.parametrize("tokens", [["x" * (i + 1) for i in range(500)], [f"<SPECIAL_{i}>" for i in range(2000)]])
def test_many_tokens(tokens: list[str]) -> None:
    special = SpecialText(tokens)
    text = "y".join(tokens)
    assert found(special, own(text)) == tokens


def test_a_token_as_long_as_a_book_takes_no_more_memory_than_it_has() -> None:
    special = SpecialText(["<" + "x" * 1_000_000])
    assert special.could_begin_in("<xxx")
    assert special.ends_with_beginning("<xxx")
    assert not special.ends_with_beginning("<xxxy")


def test_tokens_within_words(smollm2: Tokenizer) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_str(smollm2.library.to_str())
    library.add_special_tokens([AddedToken("word", single_word=True, normalized=False, special=True)])
    tokenizer = Tokenizer(library)
    for text in ("word", "a word.", "words", "sword", "é-word", "word_"):
        assert encode_traced(tokenizer, own(text)) == tokenizer.encode(text), text


@pytest.mark.parametrize(
    "piece", ["<", "<|im_end", "<|im_end|>", "<|im_start|>user\n", "\ue000", "<SPECIAL_19", "<<|a"]
)
@pytest.mark.parametrize("trusted", [False, True])
def test_the_time_is_linear(piece: str, trusted: bool) -> None:
    """Ten times the text in some ten times the time, where anything quadratic takes a hundred times."""
    special = SpecialText(["<|im_end|>", "<|im_start|>", *(f"<SPECIAL_{i}>" for i in range(2000))])

    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        began = time.process_time()
        special.could_end_elsewhere(["a", text + "a"])
        assert special.could_begin_in([{"content": text}, "<|im_end|>"])
        found(special, joined([own("<|im_start|>"), own(text) if trusted else text, own("<|im_end|>")]))
        return time.process_time() - began

    short = min(seconds(200_000) for _ in range(3))
    assert seconds(2_000_000) < 40 * short + 0.05


def test_a_text_in_which_everybody_wrote_every_other_character_takes_linear_time() -> None:
    """A template that puts something between a caller's characters makes as many runs."""
    template = ChatTemplate(
        "{{ messages[0].content | list | join('[') }}{{ messages[0].content.split('<') | join('<') }}"
    )

    def seconds(size: int) -> float:
        began = time.process_time()
        text = template.render_traced(special, [{"role": "user", "content": "<|" * size}], None, True, {})
        found(special, text)
        return time.process_time() - began

    special = SpecialText(["<|im_end|>", "[["])
    short = min(seconds(10_000) for _ in range(3))
    assert seconds(100_000) < 40 * short + 0.05
