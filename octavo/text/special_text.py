"""Special tokens in text: where they occur, and how a caller's text is kept from forging them.

Works on any tokenizer and any template; what a message is, `chat_template` knows.
"""

import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


# Characters to mark with, best first: those for private use (in the first plane a text is not made wider by them),
# then all others that are no surrogates, from the end, where few stand for anything.
_MARKS = ((0xE000, 0xF900), (0xF0000, 0x110000), (0x20000, 0xF0000), (0xF900, 0x20000), (0x80, 0xD800))


class SpecialText:
    """The texts of a tokenizer's special tokens, ready to be searched for."""

    def __init__(self, tokens: Iterable[str]):
        tokens = list(tokens)
        longest_first = sorted(tokens, key=len, reverse=True)
        self._alternatives = "|".join(map(re.escape, longest_first))
        self.characters = frozenset(chain.from_iterable(tokens))
        self.pattern = re.compile(self._alternatives or r"(?!)")
        # A token that begins like a word is left out: "user" must stay "user" where a template compares it.
        self._sorted = sorted(token for token in tokens if not token[0].isalnum())
        self._longest = max(map(len, self._sorted), default=0)
        self._last = frozenset(chain.from_iterable(token[:-1] for token in self._sorted))

    def genuine(self, mark: str) -> re.Pattern[str]:
        """Matches what no mark breaks; the group makes `split` keep the tokens."""
        return re.compile(f"({self._alternatives})(?!{mark})")

    def ends_with_beginning(self, text: str) -> bool:
        """Whether the text that follows could complete a special token."""
        if not text or text[-1] not in self._last:
            return False
        return any(self._is_beginning(text[-cut:]) for cut in range(1, min(self._longest, len(text) + 1)))

    def _is_beginning(self, text: str) -> bool:
        """Whether a token goes on after `text`: tokens that begin with it stand right behind it in their order."""
        place = bisect_right(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)

    def touches(self, text: str) -> bool:
        return self.pattern.search(text) is not None or self.ends_with_beginning(text)


class Guard:
    """Keeps special tokens that a caller wrote apart from the template's own.

    A mark, a character that occurs nowhere in the request and means nothing, goes into each forged token before the
    template runs; afterwards what still reads as a special token is genuine, and the mark is taken out of the
    rest:

        caller    hi <|im_end|>        protected   hi <M|im_end|>
        rendered  <|im_start|>user\nhi <M|im_end|><|im_end|>
        encoded   [im_start] "user\nhi <|im_end|>" [im_end]
    """

    def __init__(self, tokenizer: "Tokenizer", mark: str):
        self._tokenizer = tokenizer
        self._mark = mark

    @classmethod
    def needed_for(cls, tokenizer: "Tokenizer", parts: Any) -> "Guard | None":
        """A guard if a string of `parts` holds a special token or ends with the beginning of one.

        Raises `RequestError` for a text that has every character there is.
        """
        special = tokenizer.special_text
        strings = list(_strings(parts))
        if not any(special.touches(string) for string in strings):
            return None
        used = set(special.characters).union(*strings)
        for mark in map(chr, chain.from_iterable(range(first, end) for first, end in _MARKS)):
            if mark not in used:
                return cls(tokenizer, mark)
        raise RequestError(
            f"the messages hold special tokens and each of Unicode's {sys.maxunicode + 1:,} characters; leave some out",
            "messages",
        )

    def protect(self, value: Any) -> Any:
        """`value` with all strings in it protected, keys of mappings too."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        return value

    def _protect_text(self, text: str) -> str:
        special = self._tokenizer.special_text
        broken = special.pattern.sub(lambda found: found[0][0] + self._mark + found[0][1:], text)
        return broken + self._mark if special.ends_with_beginning(text) else broken

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text whose user parts were protected."""
        pieces = self._tokenizer.special_text.genuine(self._mark).split(text)
        ids: list[int] = []
        # re.split with one group gives text, token, text, ..., text.
        for place in range(0, len(pieces), 2):
            piece = pieces[place]
            if place > 0:
                token = self._tokenizer.special_tokens[pieces[place - 1]]
                index = self._tokenizer.token_id(token.content)
                assert index is not None, f"special token {token.content!r} has no id"
                ids.append(index)
                piece = piece.lstrip() if token.rstrip else piece
            if place + 1 < len(pieces) and self._tokenizer.special_tokens[pieces[place + 1]].lstrip:
                piece = piece.rstrip()
            ids += self._tokenizer.encode_piece(piece.replace(self._mark, ""), first=place == 0)
        return ids


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
