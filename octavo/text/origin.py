"""Texts that know which of their characters a chat template wrote by itself.

A plain str counts as somebody else's, all of it. What a method here does not pass on is lost the same way: an operation
that nobody thought of can make a template's own characters count as a caller's, and never the other way round.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, SupportsIndex

from markupsafe import Markup

_OWN, _FOREIGN = b"\x01", b"\x00"
_MOST_CONVERSIONS = 10_000  # of a pattern of printf that is looked at
# A conversion of printf. Stars are not understood, see `__mod__`.
_CONVERSION = re.compile(r"%(?:\((\w*)\))?([#0\- +]*\d*(?:\.\d*)?[hlL]?[a-zA-Z%])")


class TracedText(str):
    """A str with a byte for each character: 1 where the template wrote it.

    It compares, hashes, is searched and measured as the str that it is. A result without any character of the
    template's is a plain str.
    """

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, text: str, own: bytes) -> "TracedText":
        assert len(text) == len(own), "each character has its byte"
        made = super().__new__(cls, text)
        made._own = own
        return made

    def __str__(self) -> str:
        return self

    # ---- parts --------------------------------------------------------------------------------------------------

    def _part(self, start: int, stop: int) -> str:
        return _made(str.__getitem__(self, slice(start, stop)), self._own[start:stop])

    def _parts(self, lengths: Iterable[int], gap: int = 0) -> list[str]:
        """Parts of these lengths from the beginning on, `gap` characters between them."""
        parts, start = [], 0
        for length in lengths:
            parts.append(self._part(start, start + length))
            start += length + gap
        return parts

    def _words(self, words: Iterable[str]) -> list[str]:
        """What a split at white space found: each begins behind the one before."""
        parts, start = [], 0
        for word in words:
            start = str.find(self, word, start)
            parts.append(self._part(start, start + len(word)))
            start += len(word)
        return parts

    def __getitem__(self, key: SupportsIndex | slice, /) -> str:
        text = str.__getitem__(self, key)
        if isinstance(key, slice):
            return _made(text, self._own[key])
        return _own_character(text) if self._own[key] else text

    def __iter__(self) -> Iterator[str]:
        for character, own in zip(str.__iter__(self), self._own, strict=True):
            yield _own_character(character) if own else character

    def split(self, /, *args: Any, **kwargs: Any) -> list[str]:
        return self._split(str.split(self, *args, **kwargs), *args, **kwargs)

    def rsplit(self, /, *args: Any, **kwargs: Any) -> list[str]:
        return self._split(str.rsplit(self, *args, **kwargs), *args, **kwargs)

    def _split(self, found: list[str], sep: str | None = None, maxsplit: int = -1) -> list[str]:
        return self._words(found) if sep is None else self._parts(map(len, found), len(sep))

    def splitlines(self, /, *args: Any, **kwargs: Any) -> list[str]:
        lines = self._parts(map(len, str.splitlines(self, True)))
        return [line[: len(found)] for line, found in zip(lines, str.splitlines(self, *args, **kwargs), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        left, middle, right = self._parts(map(len, str.partition(self, sep)))
        return left, middle, right

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        left, middle, right = self._parts(map(len, str.rpartition(self, sep)))
        return left, middle, right

    def strip(self, chars: str | None = None, /) -> str:
        length = len(str.strip(self, chars))
        start = len(self) - len(str.lstrip(self, chars))
        return self._part(start, start + length)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._part(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._part(0, len(str.removesuffix(self, suffix)))

    # ---- more of it ---------------------------------------------------------------------------------------------

    # What goes together with no text, or with markup, does so as any str, in error too.

    def __add__(self, other: Any, /) -> Any:
        if not isinstance(other, str) or isinstance(other, Markup):
            return plain(self) + other
        return joined((self, other))

    def __radd__(self, other: Any, /) -> Any:
        return joined((other, self)) if isinstance(other, str) else other + plain(self)

    def __mul__(self, times: Any, /) -> Any:
        if not hasattr(times, "__index__"):
            return plain(self) * times
        return _made(str.__mul__(self, times), self._own * times)

    __rmul__ = __mul__

    def join(self, pieces: Iterable[str], /) -> str:
        return joined(pieces, self)

    def replace(self, /, *args: Any, **kwargs: Any) -> str:
        text = str.replace(self, *args, **kwargs)
        old, new, count = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("count", -1)
        if is_own(self) and is_own(new):
            return own(text)
        made, start, put = bytearray(), 0, own_characters(new)
        if _OWN not in self._own and _OWN not in put:
            return text
        count = len(self) + 1 if count < 0 else count
        # Of nothing there is one before each character, and one at the end.
        while count > 0 and (at := str.find(self, old, start + (not old and len(made) > 0))) >= 0:
            made += self._own[start:at] + put
            start, count = at + len(old), count - 1
        return _made(text, bytes(made + self._own[start:]))

    def __mod__(self, values: Any, /) -> str:
        text = str.__mod__(self, values)
        if str.count(self, "%") > _MOST_CONVERSIONS:
            return text
        try:
            found = joined(self._formatted(values))
        except (LookupError, TypeError, ValueError, StopIteration):
            return text
        # Whatever `_formatted` does not know in the pattern shows here.
        return found if found == text else text

    def _formatted(self, values: Any) -> list[str]:
        """The pieces of `self % values`: the pattern's own, and between them what %s puts in as it is."""
        pieces, start = [], 0
        in_turn = iter(values if isinstance(values, tuple) else (values,))
        for found in _CONVERSION.finditer(self):
            pieces.append(self._part(start, found.start()))
            start = found.end()
            name, kind = found.groups()
            if kind == "%":
                pieces.append(self._part(start - 1, start))
                continue
            value = next(in_turn) if name is None else values[name]
            pieces.append(str(value) if kind == "s" else str.__mod__("%" + kind, (value,)))
        pieces.append(self._part(start, len(self)))
        return pieces


class TracedMarkup(Markup):
    """What the filter `safe` makes of a traced text; other operations on it lose the trace."""

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, object: Any = "", encoding: str | None = None, errors: str = "strict") -> "TracedMarkup":
        made = super().__new__(cls, object, encoding, errors)
        made._own = own_characters(object) if isinstance(object, str) else bytes(len(made))
        return made

    def __str__(self) -> str:
        return _made(str.__str__(self), self._own)

    def __repr__(self) -> str:
        return f"Markup({str.__repr__(self)})"


def _recased(name: str) -> Callable[[TracedText], str]:
    plain: Callable[[str], str] = getattr(str, name)

    def method(self: TracedText) -> str:
        # Each character becomes one or more, so that equal lengths mean one for one.
        text = plain(self)
        return _made(text, self._own) if len(text) == len(self) else text

    method.__name__ = name
    return method


for _name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
    setattr(TracedText, _name, _recased(_name))


def _made(text: str, own: bytes) -> str:
    return TracedText(text, own) if _OWN in own else text


@lru_cache(1024)
def _own_character(character: str) -> TracedText:
    """One for all places, as Python has it for common characters: a long text may be made a list of them."""
    return TracedText(character, _OWN)


def own_characters(text: str) -> bytes:
    """A byte for each character: 1 where a template wrote it."""
    return text._own if isinstance(text, (TracedText, TracedMarkup)) else bytes(len(text))


def is_own(text: str) -> bool:
    """Whether all of it is the template's."""
    return isinstance(text, TracedText) and _FOREIGN not in text._own


def own(text: str) -> TracedText:
    """A text that is wholly the template's."""
    return TracedText(text, _OWN * len(text))


def foreign(text: str) -> TracedText:
    """A text that is as it was, with methods that keep apart what they are given."""
    return text if isinstance(text, TracedText) else TracedText(text, own_characters(text))


def joined(pieces: Iterable[str], separator: str = "") -> str:
    """`separator.join(pieces)`, traced."""
    pieces = list(pieces)
    text = str.join(separator, pieces)
    if not isinstance(separator, TracedText) and not any(isinstance(piece, TracedText) for piece in pieces):
        return text
    return _made(text, own_characters(separator).join(map(own_characters, pieces)))


def plain(text: str) -> str:
    """The str alone."""
    return str.__str__(text)


def own_runs(text: str) -> Iterator[tuple[int, int]]:
    """Where the template's own characters stand together: (begin, end) of each run."""
    if isinstance(text, TracedText):
        for run in re.finditer(rb"\x01+", text._own):
            yield run.span()


def strings(value: Any) -> Iterator[str | None]:
    """All texts in a value, keys too; None for a part whose texts cannot be seen."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
    elif value is not None and not isinstance(value, (bool, int, float)):
        yield None
