"""A model in a hub's repository: which of its files are needed, whether they are here, whether they will fit.

What every hub shares. How a hub lists and sends files is known to `huggingface` and `modelscope`; where the caches lie
to `caches`. No network here: `locate` asks a hub only for what no cache holds.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from octavo.checkpoint.caches import places_of
from octavo.checkpoint.fetch_progress import FetchProgress
from octavo.config import format_size
from octavo.errors import CheckpointError, DownloadError

INDEX = "model.safetensors.index.json"
# Besides the weights. Small files come first, so that a folder with weights has everything else too.
_SIDE_FILES = {
    *("config.json", "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<file>[^\s:]+))?")


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """`ORG/NAME`, or `ORG/NAME:FILE` where FILE is a GGUF file or a tag of its name, such as Q4_K_M."""

    repo_id: str
    file: str | None = None

    @classmethod
    def parse(cls, model: str) -> "RepositoryName | None":
        """None if `model` cannot be the name of a repository."""
        found = _NAME.fullmatch(model)
        return cls(found["repo"], found["file"]) if found else None

    def __str__(self) -> str:
        return self.repo_id + (f":{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file as the hub lists it; `sha256` is empty where the hub gives none."""

    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one revision: `asked` as the user named it, `revision` exact where the hub has commits."""

    repo_id: str
    asked: str
    revision: str
    files: tuple[RepositoryFile, ...]


class Hub(Protocol):
    """Where repositories live. All methods raise `DownloadError` with the fix."""

    name: str  # as in --hub
    title: str  # for a person
    variable: str  # which moves the cache
    immutable: bool  # whether what lies in `folder` is what a listing of it has, for ever

    def list_files(self, repo_id: str, revision: str | None) -> Listing: ...

    def folder(self, listing: Listing) -> Path:
        """Where the files of `listing` lie once they are fetched."""
        ...

    def fetch(self, listing: Listing, files: Sequence[RepositoryFile], progress: FetchProgress) -> None:
        """Puts `files` into `folder(listing)`, in their order, checked."""
        ...

    def num_fetched(self, listing: Listing, files: Sequence[RepositoryFile]) -> int:
        """Bytes of `files` that an interrupted fetch has left, and that need not come again."""
        ...

    def settle(self, listing: Listing) -> None:
        """Notes in the cache, once all files are there, what the revision that was asked for means."""
        ...

    def read_range(self, listing: Listing, file: RepositoryFile, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` of a file, without fetching the rest."""
        ...


def find_complete(name: RepositoryName, hub: str, revision: str | None) -> Path | None:
    """The folder (or GGUF file) of a model that is whole in the cache of `hub`, found without any network."""
    for place in places_of(name.repo_id, hub, revision):
        if place.is_dir() and (revision is None or _is_revision(place, revision)):
            whole = _whole(place, name)
            if whole is not None:
                return whole
    return None


Before = Callable[[Listing, Sequence[RepositoryFile]], None]


def pull(name: RepositoryName, hub: Hub, revision: str | None, before: Before | None = None) -> Path:
    """Fetches what is needed and not there yet of a repository; the folder, or the GGUF file if it is one.

    `before` is called with what is needed, if something of it must be fetched, and may refuse.
    """
    listing = hub.list_files(name.repo_id, revision)
    files = needed_files(name, listing.files)
    folder = hub.folder(listing)
    missing = [file for file in files if not _is_there(folder / file.path, file, hub.immutable)]
    try:
        if missing:
            if before is not None:
                before(listing, files)
            total = sum(file.size for file in missing)
            check_disk(str(name), total - hub.num_fetched(listing, missing), folder, hub.variable)
            with FetchProgress(str(name), total, f"from {hub.title}") as progress:
                hub.fetch(listing, missing, progress)
        hub.settle(listing)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {folder}: {error.strerror or error}; set {hub.variable} to another folder"
        ) from None
    return folder / files[-1].path if files[-1].path.endswith(".gguf") else folder


def needed_files(name: RepositoryName, files: Iterable[RepositoryFile]) -> list[RepositoryFile]:
    """The files of a repository that a model is run from, weights last; raises `CheckpointError` if it has none."""
    by_path = {file.path: file for file in files if "/" not in file.path or file.path.endswith(".gguf")}
    return [by_path[path] for path in choose_paths(name, by_path)]


def choose_paths(name: RepositoryName, paths: Iterable[str]) -> list[str]:
    """`needed_files` on bare paths."""
    paths = sorted(paths)
    if name.file:
        return [_chosen_gguf(name, paths)]
    tensors = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    if INDEX in paths:
        tensors = [path for path in tensors if re.fullmatch(r"model-.*", path)] or tensors
    elif "model.safetensors" in tensors:
        tensors = ["model.safetensors"]
    if tensors:
        return [path for path in paths if path in _SIDE_FILES or path.endswith(".tiktoken")] + tensors
    if any(path.endswith(".gguf") for path in paths):
        return [_chosen_gguf(name, paths)]
    if pickles := [path for path in paths if path.endswith(_PICKLES)]:
        raise CheckpointError(
            f"{name} has its weights only as {pickles[0]}, a pickle, which can run code when it is read; take a"
            " revision or a repository with safetensors, or convert it with transformers' save_pretrained"
        )
    raise CheckpointError(f"{name} has neither safetensors nor GGUF files; name a repository with a model's weights")


def _chosen_gguf(name: RepositoryName, paths: Sequence[str]) -> str:
    found = [path for path in paths if path.endswith(".gguf")]
    if name.file in found:
        return name.file
    if name.file:
        tag = re.compile(rf"(^|[-._/]){re.escape(name.file)}([-._/]|$)", re.IGNORECASE)
        chosen = [path for path in found if tag.search(path.removesuffix(".gguf"))]
    else:
        chosen = found
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(PurePosixPath(path).name for path in (chosen or found)[:12])
    how_many = "several GGUF files" if chosen else "no such GGUF file"
    raise CheckpointError(f"{name}: the repository has {how_many}; name one as {name.repo_id}:FILE, of: {listed}")


def check_disk(name: str, needed: int, folder: Path, variable: str) -> None:
    """Raises `DownloadError` if `needed` bytes do not fit where `folder` is or will be."""
    free = free_disk(folder)
    if needed > free:
        raise DownloadError(
            f"{name} needs {format_size(needed)} of disk, and {folder} has {format_size(free)} free; free some, or set"
            f" {variable} to a folder on another disk"
        )


def free_disk(folder: Path) -> int:
    """Free bytes of the disk on which `folder` is, or will be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _is_there(path: Path, file: RepositoryFile, immutable: bool) -> bool:
    """Whether a file need not be fetched; one of the same size may be of another time, unless its folder is of one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if immutable or not file.sha256:
        return True
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def safe_path(path: str) -> str:
    """A path of a hub's listing, which must stay inside the folder; raises `DownloadError`."""
    if path.startswith("/") or ".." in path.split("/"):
        raise DownloadError(f"the hub lists the file {path!r}, which lies outside its repository; do not use it")
    return path


def safe_sha256(text: str) -> str:
    """A SHA-256 of a hub's listing, which becomes a file's name; empty for none. Raises `DownloadError`."""
    if text and not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise DownloadError(f"the hub lists the SHA-256 {text[:100]!r}, which is none; do not use it")
    return text.lower()


def _is_revision(place: Path, revision: str) -> bool:
    """Whether a folder of a cache holds `revision`, for all that its name and its neighbours say."""
    for snapshots in (folder for folder in place.parents if folder.name == "snapshots"):
        reference = snapshots.parent / "refs" / revision
        commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
        return place.relative_to(snapshots).as_posix() == commit  # a branch's name may have slashes
    # ModelScope's older client keeps one revision, and notes it as `Revision:NAME,CreatedAt:TIME`.
    note = place / ".mv"
    return note.is_file() and f"Revision:{revision}," in note.read_text("utf-8", "replace") + ","


def _whole(place: Path, name: RepositoryName) -> Path | None:
    """`place`, or the GGUF file in it, if all that a model needs is there."""
    paths = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    # ModelScope's older client keeps what it is fetching in a folder that begins with a dot.
    paths = [path for path in paths if not path.startswith(".")]
    try:
        chosen = choose_paths(name, paths)
    except CheckpointError:
        return None
    if chosen[-1].endswith(".gguf"):
        return place / chosen[-1]
    if "config.json" not in chosen or not set(shards_of(place)) <= set(paths):
        return None
    return place


def shards_of(place: Path) -> list[str]:
    """The files that a folder's index names; empty without an index, or with one that cannot be read."""
    try:
        index = json.loads((place / INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    return sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, Mapping) else []
