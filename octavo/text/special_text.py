"""Special tokens in text: where they occur, and how they are kept to those that a template wrote by itself.

Works on any tokenizer and any template; what a message is, `chat_template` knows, and who wrote what, `origin`.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from octavo.text.origin import own_runs, plain, strings

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

# Where other text may be put into a template's: what printf and `str.format` replace.
_PLACES = re.compile(r"%(?:\(\w*\))?[#\- +\d.*]*[a-zA-Z]|\{[^{}]*\}")
_DEEPEST = 40  # Python's own limit of groups within groups is about a hundred


class SpecialText:
    """The texts of a tokenizer's special tokens, ready to be searched for."""

    def __init__(self, tokens: Iterable[str]):
        self._sorted = sorted(set(tokens))
        self._longest = max(map(len, self._sorted), default=0)
        self._last = {character for token in self._sorted for character in token[:-1]}
        self._first = _any_of(sorted({token[0] for token in self._sorted}))
        self.pattern = _any_of(self._sorted)

    def ends_with_beginning(self, text: str) -> bool:
        """Whether the text that follows could complete a special token."""
        if not text or text[-1] not in self._last:
            return False
        return any(self._is_beginning(text[-cut:]) for cut in range(1, min(self._longest, len(text) + 1)))

    def _is_beginning(self, text: str) -> bool:
        """Whether a token goes on after `text`: tokens that begin with it stand right behind it in their order."""
        place = bisect_right(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)

    def could_begin_in(self, foreign: Any) -> bool:
        """Whether a special token could begin in what others wrote, however it is cut and put together.

        So a single `<` is enough: a template that takes something out may make a token of what is left.
        """
        return any(text is None or self._first.search(text) is not None for text in strings(foreign))

    def could_end_elsewhere(self, own: Iterable[str]) -> bool:
        """Whether a template's own texts hold the beginning of a special token that others may complete: at the end,
        before a place that is filled in, or within (`<|role|>`), where a word may be replaced."""
        return any(self._begins_one(piece) for text in own for piece in _PLACES.split(self.pattern.sub("{}", text)))

    def _begins_one(self, text: str) -> bool:
        # A single sign, a sign and a letter, and "</" begin all kinds of text.
        signs = (text[found.start() : found.start() + 2] for found in self._first.finditer(text))
        signs = (two for two in signs if len(two) == 2 and not two[1].isalnum() and two[1] != "/")
        return self.ends_with_beginning(text) or any(map(self._is_beginning, signs))

    def own(self, text: str) -> Iterator[re.Match[str]]:
        """The special tokens that lie wholly in a run of the template's own characters."""
        everything = plain(text)
        for begin, end in own_runs(text):
            yield from self.pattern.finditer(everything, begin, end)


def encode_traced(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of a rendered text, in which special tokens are those that the template wrote, and the rest is text.

    rendered   <|im_start|>user\\nhi <|im_end|><|im_end|>
    template's 111111111111111111110000000000001111111111
    encoded    [im_start] "user\\nhi <|im_end|>" [im_end]
    """
    everything = plain(text)
    pieces: list[str] = []
    ids: list[int] = []
    start, strips = 0, False
    for found in tokenizer.special_text.own(text):
        token = tokenizer.special_tokens[found[0]]
        if token.single_word and _within_word(everything, found):
            continue
        piece = everything[start : found.start()]
        piece = piece.lstrip() if strips else piece
        pieces.append(piece.rstrip() if token.lstrip else piece)
        index = tokenizer.token_id(token.content)
        assert index is not None, f"special token {token.content!r} has no id"
        ids.append(index)
        start, strips = found.end(), token.rstrip
    pieces.append(everything[start:].lstrip() if strips else everything[start:])
    encoded = tokenizer.encode_pieces(pieces)
    for place, index in enumerate(ids):
        encoded[place].append(index)
    return [index for piece in encoded for index in piece]


def _within_word(text: str, found: re.Match[str]) -> bool:
    around = (text[found.start() - 1 : found.start()], text[found.end() : found.end() + 1])
    return any(re.match(r"\w", character) for character in around)


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern for the longest of the tokens at a place, in time that does not depend on how many there are.

    `tokens` are sorted and differ.
    """
    try:
        return re.compile(_tree(tokens, 0, 0) if tokens else r"(?!)")
    except RecursionError:  # Tokens that go on from each other, many times over.
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _tree(tokens: Sequence[str], place: int, depth: int) -> str:
    """`tokens` from `place` on, up to which they are equal."""
    if depth > _DEEPEST:
        raise RecursionError
    first, last = tokens[0], tokens[-1]
    if first == last:
        return re.escape(first[place:])
    # What the first and the last have in common, all have, and one that ends there is the first.
    common = next((at for at in range(place, len(first)) if first[at] != last[at]), len(first))
    written, ends = re.escape(first[place:common]), len(first) == common
    tokens = tokens[1:] if ends else tokens
    branches, begin = [], 0
    for index in range(1, len(tokens) + 1):
        if index == len(tokens) or tokens[index][common] != tokens[begin][common]:
            branches.append(_tree(tokens[begin:index], common, depth + 1))
            begin = index
    return f"{written}(?:{'|'.join(branches)})" + ("?" if ends else "")
