"""Every error that a user of Octavo can meet.

A user's mistake names the field, the value and the fix; an internal invariant is an `assert`, not one of these.
Nothing here knows about HTTP: `server` maps these classes to status codes.
"""

from collections.abc import Iterable
from difflib import get_close_matches

_MOST_CHARACTERS = 2000


class OctavoError(Exception):
    """Base of all errors meant to be read by a user; its text is one line that says what to do.

    What a file, a library or a template says, and the message then quotes, may have more lines, be of any length, or be
    no Unicode.
    """

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines()).encode("utf-8", "backslashreplace").decode()
        half = _MOST_CHARACTERS // 2
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class ConfigError(OctavoError, ValueError):
    """An option or a model's configuration is wrong, missing or contradicts another."""


class RequestError(OctavoError, ValueError):
    """A request is invalid: the fault is the caller's, and the same request will fail again.

    `param` is the request's field at fault, where one can be named.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class CheckpointError(OctavoError):
    """A model's files are missing, damaged or of a kind that Octavo cannot read."""


class DownloadError(OctavoError):
    """A model could not be fetched."""


class CapacityError(OctavoError):
    """Weights or KV cache do not fit this machine's memory."""


class QueueFullError(OctavoError):
    """The waiting queue is at its bound; the same request may succeed later."""


class EngineDeadError(OctavoError):
    """The engine stopped working; open requests are lost."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `known`, or an empty string when nothing is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
