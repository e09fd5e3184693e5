"""Finding stop strings in text that arrives in pieces, holding back no more than could be the beginning of
one.

The result does not depend on how the text is cut into pieces: the string that is completed first wins, the
longest one if several end together.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string found: the text before it, and the string itself."""

    text: str
    stop: str


class StopStrings:
    """A watch over one sequence's text for the strings `stops`."""

    __slots__ = ("_first", "_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._first = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str, *, count: bool = True) -> str | Match:
        """Text that may leave now, or the match that ends it.

        `count=False`: too early, stop strings are text.
        """
        if not text:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text
        text = self._held + text
        if count and (match := self._find(text)) is not None:
            self._held = ""
            return match
        held_from = self._beginning_of_stop(text)
        self._held = text[held_from:]
        return text[:held_from]

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> Match | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return Match(text[:start], stop)

    def _beginning_of_stop(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts; its length if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                end = text[start:]
                if any(len(stop) > len(end) and stop.startswith(end) for stop in self._stops):
                    return start
        return len(text)
