"""A model's files as one thing: configuration, tensors and tokenizer data, whatever the format on disk.

`open_checkpoint` takes what a user names. Every format speaks Hugging Face's words: `config` reads like
config.json, tensors carry Hugging Face's names in [out, in] order. Bytes stay bytes here: no torch, no
arithmetic on weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.checkpoint.types import Check, Checkpoint, Description, TensorInfo, TokenizerData
from octavo.config import EngineOptions, expanded
from octavo.errors import CheckpointError, DownloadError, nearest

__all__ = [
    "Check",
    "Checkpoint",
    "Description",
    "TensorInfo",
    "TokenizerData",
    "local_path",
    "locate",
    "open_checkpoint",
    "open_engine_checkpoint",
    "open_tokenizer_data",
]


def open_checkpoint(
    model: str,
    *,
    hub: str = "auto",
    revision: str | None = None,
    weights: bool = True,
    check: Check | None = None,
) -> Checkpoint:
    """Open what a user names: a known name such as `smollm2:135m`, a GGUF file, a folder, or `ORG/NAME` of a hub.

    A model that is not on this machine yet is fetched first, once `check` has seen what it says of itself.
    `weights=False` accepts a folder without safetensors files (its `tensors` are then empty). Raises `CheckpointError`,
    `DownloadError` or what `check` raises.
    """
    path = locate(model, hub, revision, check)
    if path.is_dir():
        from octavo.checkpoint.folder import FolderCheckpoint

        return FolderCheckpoint(path, weights=weights)
    from octavo.checkpoint.gguf_model import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    checkpoint.generation_config |= _advice(model)
    return checkpoint


def open_engine_checkpoint(options: EngineOptions, check: Check | None = None) -> Checkpoint:
    """`open_checkpoint` of the model that an engine is to run."""
    weights = options.load_format != "dummy"
    return open_checkpoint(options.model, hub=options.hub, revision=options.revision, weights=weights, check=check)


def open_tokenizer_data(source: str, *, hub: str = "auto", revision: str | None = None) -> TokenizerData:
    """Tokenizer of a model (see `open_checkpoint`), of a folder with a tokenizer.json, or of that file."""
    named = _known_path(source)
    of_tokenizer = named is not None and named.name in ("tokenizer.json", "qwen.tiktoken") and named.is_file()
    path = named.parent if named is not None and of_tokenizer else locate(source, hub, revision)
    if path.is_dir():
        from octavo.checkpoint.folder import read_tokenizer_data

        return read_tokenizer_data(path)
    from octavo.checkpoint.gguf_model import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    checkpoint.generation_config |= _advice(source)
    return checkpoint.tokenizer_data()


def _advice(model: str) -> Mapping[str, Any]:
    """What is advised for a known name."""
    from octavo.checkpoint import hub as known

    return known.MODELS[model].advice if model in known.MODELS else {}


def locate(model: str, hub: str = "auto", revision: str | None = None, check: Check | None = None) -> Path:
    """The GGUF file or the folder that `model` names, fetched if it is not there yet, see `open_checkpoint`."""
    from octavo.checkpoint import hub as known
    from octavo.checkpoint import hubs

    if model in known.MODELS:
        return known.pull(model)
    if (path := local_path(model)) is not None:
        return path
    if (name := hubs.RepositoryName.parse(model)) is not None:
        try:
            return hubs.find(name, hub, revision) or hubs.pull(name, hub, revision, check)
        except PermissionError as error:
            raise DownloadError(
                f"{error.filename}, a folder of a hub's cache, cannot be read: {error.strerror}; let this user read it,"
                " or set HF_HOME or MODELSCOPE_CACHE to another folder"
            ) from None
    listed = ", ".join(known.MODELS)
    raise CheckpointError(
        f"model {model!r} is neither a known name ({listed}), nor a .gguf file, nor a folder with config.json, nor"
        f" ORG/NAME of a hub.{nearest(model, known.MODELS)}"
    )


def local_path(model: str) -> Path | None:
    """The GGUF file or the folder at the path `model`; None if there is neither."""
    path = _known_path(model)
    if path is None:
        return None
    if path.is_dir():
        single = sorted(path.glob("*.gguf"))
        if len(single) == 1 and not (path / "config.json").exists():
            return single[0]
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise CheckpointError(f"{model} is {_kind(path)}")
    return None


def _kind(path: Path) -> str:
    """What a file that was named as a model is, with what to do."""
    from octavo.checkpoint.foreign import described

    if path.suffix in (".safetensors", ".json", ".jinja", ".model"):
        return "one file of a model; name the folder around it"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "a pickle, which can run code when it is read; name a folder with safetensors, or a .gguf file"
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror}); make it readable"
    return described(beginning) or "a file but not a .gguf one; for safetensors, name the folder around it"


def _known_path(name: str) -> Path | None:
    """The path `name`, if something is there; what can be no path at all may still be another kind of name."""
    try:
        path = expanded(name)
        return path if path.exists() else None
    except PermissionError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}; make it readable") from None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a zero inside
        return None
