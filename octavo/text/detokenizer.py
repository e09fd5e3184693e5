"""Text of a sequence, token by token, without a broken character ever leaving.

Deltas joined equal `Tokenizer.decode` of all the ids. Stop strings and special meanings of tokens are not
known here.
"""

import codecs

from octavo.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One sequence's text in the making.

    `continued=True` is for an answer that follows a prompt: there, SentencePiece's leading space separates
    words and stays; otherwise it is dropped as `Tokenizer.decode` does.
    """

    __slots__ = ("_decoder", "_ids", "_read", "_skipped", "_start", "_strip_space", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, continued: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = _UTF8("replace")
        self._strip_space = tokenizer.strips_space and not continued
        # The fallback's window: `_ids[_start:_read]` is text that left already and `_ids[_read:]` has not.
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty in the middle of a character."""
        if token_id in self._skipped:
            return ""
        if not self._tokenizer.by_bytes:
            return self._push_to_window(token_id)
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        return self._first(text) if self._strip_space else text

    def flush(self) -> str:
        """What is left when no token follows: a cut character becomes U+FFFD."""
        if not self._tokenizer.by_bytes:
            return self._take_window(last=True)
        text = self._decoder.decode(b"", True)
        return self._first(text) if self._strip_space else text

    def _first(self, text: str) -> str:
        if text:
            self._strip_space = False
        return text.removeprefix(" ")

    def _push_to_window(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._take_window(last=False)

    def _take_window(self, last: bool) -> str:
        """Decode a few old tokens with and without the new ones; the difference is the new text."""
        decode = self._tokenizer.decode
        old = decode(self._ids[self._start : self._read], skip_special_tokens=False)
        new = decode(self._ids[self._start :], skip_special_tokens=False)
        if len(new) <= len(old) or (new.endswith("\ufffd") and not last):
            return ""
        # The tokens of this delta are the next one's context: whole characters, and few, so a step's work is
        # bounded.
        self._start, self._read = self._read, len(self._ids)
        return new[len(old) :]
