"""JSON of one line, for streams and files whose readers take it line by line."""

import json
from typing import Any

# Made once: `json.dumps` with options makes a new encoder for each call.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_encode_spaced = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
# What ends a line for str.splitlines, and so for many clients, but is no control character that JSON escapes itself.
_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


def json_line(value: Any, *, spaced: bool = False) -> str:
    """`value` as JSON without an end of a line in it, by any reader's idea of one; other characters stay as they are.

    `spaced`: with spaces after commas and colons, for people. `value` holds no cycle.
    """
    text = _encode_spaced(value) if spaced else _encode(value)
    if not text.isascii():
        for end, escape in _ENDS:
            text = text.replace(end, escape)
    return text
