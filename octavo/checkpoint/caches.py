"""Where the caches that the hubs' own clients keep lie, and the folders in them that may hold a model.

Whether a model there is whole is for `repository` to say. Fetches nothing, and reads none of the side files
(ModelScope's `.msc` is a pickle). Layouts:

    ModelScope, old     {root}/[hub/][models/]{owner}/{name, '.' written '___'}/
    ModelScope, new     {root}/models/{owner}--{name}/snapshots/{revision}/
    Hugging Face        {root}/hub/models--{owner}--{name}/refs/{revision} -> snapshots/{commit}/
"""

import os
from collections.abc import Iterator
from pathlib import Path

from octavo.config import expanded, user_cache
from octavo.errors import ConfigError

HUBS = ("modelscope", "hf")


def places_of(repo_id: str, hub: str, revision: str | None = None) -> Iterator[Path]:
    """The folders in which `repo_id` may lie, likeliest first; they need not exist."""
    owner, _, name = repo_id.partition("/")
    assert name, f"{repo_id!r} is no repository: it has no owner and name"
    assert hub in HUBS, f"{hub!r} is none of the hubs {HUBS}"
    try:
        roots = [hf_cache()] if hub == "hf" else modelscope_roots()
    except ConfigError:  # of a user without a home: nothing lies there
        return
    if hub == "hf":
        yield from _snapshots(roots[0] / f"models--{owner}--{name}", revision or "main")
        return
    for root in roots:
        for between in ("", "models", "hub", "hub/models"):
            for written in dict.fromkeys((name.replace(".", "___"), name)):
                yield root / between / owner / written
        yield from _snapshots(root / "models" / f"{owner}--{name}", revision or "master")


def modelscope_roots() -> list[Path]:
    """Folders of ModelScope's cache: `MODELSCOPE_CACHE`, and the usual one where it is not set.

    Raises `ConfigError` where no home is known, as `hf_cache` does.
    """
    named = os.environ.get("MODELSCOPE_CACHE")
    if named:
        return [expanded(named)]
    home = user_cache("modelscope", "MODELSCOPE_CACHE")
    return [home / "hub", home]


def hf_cache() -> Path:
    """Folder of Hugging Face's cache: `HF_HUB_CACHE`, or `hub` under `HF_HOME`."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return expanded(named)
    home = os.environ.get("HF_HOME")
    return (expanded(home) if home else user_cache("huggingface", "HF_HOME")) / "hub"


def _snapshots(folder: Path, revision: str) -> Iterator[Path]:
    """The snapshot of `revision` in a folder of the layout with snapshots, then any other."""
    reference = folder / "refs" / revision
    if reference.is_file():
        yield folder / "snapshots" / reference.read_text("utf-8").strip()
    yield folder / "snapshots" / revision
    others = folder / "snapshots"
    if others.is_dir():
        yield from sorted(others.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
