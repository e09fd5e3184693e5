"""Who may ask: API keys, and the names by which this server may be reached.

A page in a browser can make it send requests to any address that its user's machine reaches. It cannot send JSON to
another origin than its own without being allowed to (`body` takes nothing else), so what is left to it is a name of its
own that turns into this machine's address; so a server that this machine alone reaches answers by local names.
"""

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.config import ServerOptions, expanded
from octavo.errors import ConfigError, short
from octavo.server.failure import RefusedError

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI has them, names in small letters

_VARIABLE = "OCTAVO_API_KEY"
_LOCAL_DOMAINS = (".localhost", ".internal")  # no name in them can be bought


def header(headers: Headers, name: bytes) -> bytes:
    """The first header of that name, or nothing."""
    return next((value for found, value in headers if found == name), b"")


class Keys:
    """The API keys of a server, as digests; any client may ask where there are none."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def of(cls, options: ServerOptions) -> "Keys":
        """The keys of options, of their file (it may be a pipe) and of `OCTAVO_API_KEY`; raises `ConfigError`."""
        keys = _checked(options.api_key, "api_key")
        if (given := os.environ.get(_VARIABLE)) is not None:
            keys += _of_text(given.split(","), _VARIABLE)
        if options.api_key_file is not None:
            try:
                lines = expanded(options.api_key_file).read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise ConfigError(f"api_key_file {options.api_key_file} cannot be read: {why}") from None
            keys += _of_text(lines, f"api_key_file {options.api_key_file}")
        if options.isolate_prefix_cache and not keys:
            raise ConfigError("isolate_prefix_cache tells clients apart by their API keys; give some with --api-key")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> None:
        """Raises `RefusedError` (401) unless a request with these headers brings a key.

        Takes the same time whatever is brought: digests are compared, with every key's, and in constant time.
        """
        if not self._digests:
            return
        scheme, _, key = header(headers, b"authorization").partition(b" ")
        digest = _digest(key.strip())
        found = sum([hmac.compare_digest(digest, known) for known in self._digests])
        if scheme.lower() != b"bearer" or not found:
            raise RefusedError(
                401, "a valid API key is needed: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )


def _of_text(lines: Iterable[str], source: str) -> list[str]:
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise ConfigError(f"{source} holds no key; write one, or leave it out")
    return _checked(keys, source)


def _checked(keys: Iterable[str], source: str) -> list[str]:
    found = list(keys)
    for key in found:
        if not key or not key.isprintable() or " " in key:
            raise ConfigError(
                f"a key of {source} is empty, or has blanks or characters that no header can carry; write a word"
            )
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the digest of the key that came with a request, and the user that its body names; empty without."""

    key: str = ""
    user: str = ""

    @classmethod
    def of(cls, headers: Headers, user: str | None) -> "Caller":
        key = header(headers, b"authorization").partition(b" ")[2].strip()
        return cls(_digest(key).hex() if key else "", user or "")

    @property
    def tenant(self) -> str:
        """Whose share of the engine is used."""
        who = [f"key {self.key}"] if self.key else []
        return " ".join([*who, f"user {self.user}"] if self.user else who)


NOBODY = Caller()


class Hosts:
    """The names by which a server may be reached; an address always may."""

    def __init__(self, names: Iterable[str] | None, were_named: bool = False):
        """`None` for any name. `were_named`: somebody has said which they are."""
        self._were_named = were_named
        self._names = None if names is None else frozenset(name.lower().rstrip(".") for name in names)

    @classmethod
    def of(cls, options: ServerOptions, keys: Keys) -> "Hosts":
        names = options.allowed_hosts
        if "*" in names or options.uds is not None:
            return cls(None)
        if not names and (keys or not _is_loopback(options.host)):
            return cls(None)
        return cls([*names, options.host, "localhost", socket.gethostname()], bool(names))

    def check(self, headers: Headers) -> None:
        """Raises `RefusedError` (403) for a name that is not this server's."""
        if self._names is None:
            return
        given = header(headers, b"host").decode("latin-1")
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given
        name = name.lower().rstrip(".")
        if not name or name in self._names or name.endswith(_LOCAL_DOMAINS) or _is_address(name.strip("[]")):
            return
        why = (
            "it answers by the names of --allowed-hosts and of its own machine alone; add this one there"
            if self._were_named
            else "as it is reached without a key, it answers by names of its own machine alone, lest a web page speaks"
            " to it; start it with --allowed-hosts and that name, or with --api-key"
        )
        raise RefusedError(403, f"this server is not {short(given)}: {why}", code="host_not_allowed")


def _is_loopback(host: str) -> bool:
    """Whether all that `host` stands for, however it is spelled, is this machine alone."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    addresses = [ipaddress.ip_address(str(address).partition("%")[0]) for address in found]
    return bool(addresses) and all((getattr(each, "ipv4_mapped", None) or each).is_loopback for each in addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
