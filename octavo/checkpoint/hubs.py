"""Which hub a model's name means, and the model from its cache or from its server.

`auto` is Hugging Face unless USE_HF=0 (ms-swift's variable) says ModelScope; a model that is whole in a cache of either
is used in place, whatever the hub would be, and asks nobody.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from octavo.checkpoint import repository
from octavo.checkpoint.huggingface import HuggingFace
from octavo.checkpoint.modelscope import ModelScope
from octavo.checkpoint.remote import RemoteModel
from octavo.checkpoint.repository import Hub, Listing, RepositoryFile, RepositoryName
from octavo.checkpoint.types import Check
from octavo.errors import ConfigError

__all__ = ["RepositoryName", "choose", "find", "pull"]

_HUBS: dict[str, type[Hub]] = {"hf": HuggingFace, "modelscope": ModelScope}


def choose(hub: str) -> Hub:
    """The hub that an option means."""
    if hub == "auto":
        said = os.environ.get("USE_HF", "").strip().lower()
        if said not in ("", "0", "1", "true", "false"):
            raise ConfigError(f"USE_HF is {said!r}; it must be 1 (Hugging Face) or 0 (ModelScope)")
        hub = "modelscope" if said in ("0", "false") else "hf"
    if hub not in _HUBS:
        raise ConfigError(f"hub is {hub!r}; it must be auto, hf or modelscope")
    return _HUBS[hub]()


def _check_revision(revision: str | None) -> None:
    """A revision becomes part of a path."""
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise ConfigError(f"revision is {revision!r}; it must be the name of a branch or tag, or a commit")


def find(name: RepositoryName, hub: str, revision: str | None) -> Path | None:
    """The model in a cache on this machine: of the hub that was named, or under `auto` of either."""
    _check_revision(revision)
    first = choose(hub).name
    others = [other for other in _HUBS if other != first] if hub == "auto" else []
    for place in (first, *others):
        if (path := repository.find_complete(name, place, revision)) is not None:
            return path
    return None


def pull(name: RepositoryName, hub: str, revision: str | None, check: Check | None = None) -> Path:
    """Fetches what is missing, or has changed on the hub since.

    `check` reads what the model says of itself before its weights are fetched, and raises for one that is of no use.
    """
    _check_revision(revision)
    chosen = choose(hub)

    def before(listing: Listing, files: Sequence[RepositoryFile]) -> None:
        if check is not None:
            check(RemoteModel(chosen, listing, files, whole=False))

    return repository.pull(name, chosen, revision, before)
