"""Every error that a user of Octavo can meet.

A user's mistake names the field, the value and the fix; an internal invariant is an `assert`, not one of these.
Nothing here knows about HTTP: `server` maps these classes to status codes.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

# Of a name that is compared with known ones: the comparison takes the square of its length.
_LONGEST_NAME = 100
_SHOWN = 60  # characters of a value in an error

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


class EngineStalledError(OctavoError):
    """The engine did not confirm a request in time; the same request may succeed later."""


class InternalError(OctavoError):
    """A request failed by a fault of Octavo's; other requests are not concerned."""


def internal_error(error: BaseException) -> InternalError:
    """An unexpected exception that belongs to a request, for whoever asked."""
    text = " ".join(str(error).split())[:200]
    return InternalError(f"an unexpected error ended this request: {type(error).__name__}: {text}")


def short(value: object) -> str:
    """`value` as it stands in an error: its repr, cut where it is long."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[: _SHOWN + 1]
    elif isinstance(value, dict):
        value = dict(islice(value.items(), _SHOWN))
    elif isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `known`, or an empty string when nothing is close."""
    if len(name) > _LONGEST_NAME:
        return ""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
