"""A model on a hub read before it is fetched: its configuration whole, of its weights only the headers.

A safetensors file tells its tensors in its first bytes, and so does a GGUF file; a few ranges of HTTP bring them.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.checkpoint.gguf_model import GgufCheckpoint
from octavo.checkpoint.repository import Hub, Listing, RepositoryFile, RepositoryName, needed_files
from octavo.checkpoint.safetensors import MAX_HEADER_BYTES, PREFIX_BYTES, header_size, parse_header
from octavo.checkpoint.types import TensorInfo
from octavo.errors import CheckpointError

_FIRST_RANGE = 1 << 16
# How much of a GGUF file is read until its header is whole; the vocabulary in it takes a few MB.
_GGUF_RANGES = (4 << 20, 16 << 20, 64 << 20)


class RemoteModel:
    """A `Description` over the network. `files` are those that a pull would fetch.

    With `whole` false the tensors of the first file stand for all.
    """

    def __init__(self, hub: Hub, listing: Listing, files: Sequence[RepositoryFile], *, whole: bool = True):
        self.files = files
        self.folder = hub.folder(listing)
        self._whole = whole
        self.config: dict[str, Any] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        if self.files[-1].path.endswith(".gguf"):
            self._read_gguf(hub, listing, self.files[-1])
        else:
            self._read_folder(hub, listing)

    @classmethod
    def find(cls, name: RepositoryName, hub: Hub, revision: str | None) -> "RemoteModel":
        listing = hub.list_files(name.repo_id, revision)
        return cls(hub, listing, needed_files(name, listing.files))

    def _read_folder(self, hub: Hub, listing: Listing) -> None:
        config = next((file for file in self.files if file.path == "config.json"), None)
        if config is None:
            raise CheckpointError(f"{listing.repo_id} has no config.json; name a repository with a whole model")
        try:
            self.config = dict(json.loads(hub.read_range(listing, config, 0, config.size)))
        except (ValueError, TypeError, RecursionError):
            raise CheckpointError(f"config.json of {listing.repo_id} is not a JSON object") from None
        tensors: dict[str, TensorInfo] = {}
        weights = [file for file in self.files if file.path.endswith(".safetensors")]
        for file in weights if self._whole else weights[:1]:
            tensors |= _read_header(hub, listing, file)
        self.tensors = tensors

    def _read_gguf(self, hub: Hub, listing: Listing, file: RepositoryFile) -> None:
        """Lets the reader of files read the beginning, in front of a hole as long as the rest."""
        with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
            path = Path(folder) / Path(file.path).name
            for size in _GGUF_RANGES:
                with path.open("wb") as output:
                    output.write(hub.read_range(listing, file, 0, min(size, file.size)))
                    output.truncate(file.size)
                try:
                    model = GgufCheckpoint(path)
                except CheckpointError:
                    if size >= min(file.size, _GGUF_RANGES[-1]):
                        raise
                    continue
                self.config, self.tensors = model.config, model.tensors
                return


def _read_header(hub: Hub, listing: Listing, file: RepositoryFile) -> dict[str, TensorInfo]:
    source = f"{file.path} of {listing.repo_id}"
    start = hub.read_range(listing, file, 0, min(_FIRST_RANGE, file.size))
    end = PREFIX_BYTES + min(header_size(start, source), MAX_HEADER_BYTES)
    if end > len(start):
        start += hub.read_range(listing, file, len(start), min(end, file.size))
    stored = parse_header(start[PREFIX_BYTES:end], source, file.size - end)
    return {
        name: TensorInfo(name, tensor.dtype, tensor.shape, tensor.end - tensor.start) for name, tensor in stored.items()
    }
