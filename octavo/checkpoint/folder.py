"""A Hugging Face folder: config.json, safetensors in one file or in shards, tokenizer.json (or qwen.tiktoken).

Older formats (pytorch_model.bin, tokenizer.model) are refused with a word on what to do: the first runs code
when it is read, the second needs a library of its own.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.checkpoint import tiktoken
from octavo.checkpoint.foreign import described
from octavo.checkpoint.safetensors import SafetensorsFile
from octavo.checkpoint.types import TensorInfo, TokenizerData
from octavo.errors import CheckpointError

_INDEX = "model.safetensors.index.json"

_MOST_TEXT = 512 * 1024**2  # bytes; tokenizers of the largest vocabularies have 40 MB
# What is read of generation_config.json; older models have it in config.json.
_NUMBERS = {"temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"}
_INTEGERS = {"top_k"}
_TOKEN_IDS = {"bos_token_id", "eos_token_id"}
_LARGEST = 3.4e38  # of 32 bits


class FolderCheckpoint:
    """A folder as a `Checkpoint`; `weights=False` leaves the safetensors files closed."""

    def __init__(self, path: Path, *, weights: bool = True):
        self.path = path
        config = _read_json(path / "config.json")
        if config is None:
            raise CheckpointError(f"{path} has no config.json; name a Hugging Face folder or a .gguf file")
        self.config: dict[str, Any] = config
        self.generation_config = _generation_config(path)
        self._files = _open_files(path) if weights else {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, stored.dtype, stored.shape, stored.end - stored.start)
            for name, file in self._files.items()
            for stored in (file.tensors[name],)
        }

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, a flat view of the mapped file."""
        return self._files[name].read(name)

    def tokenizer_data(self) -> TokenizerData:
        """The folder's tokenizer files."""
        return read_tokenizer_data(self.path)


def read_tokenizer_data(path: Path) -> TokenizerData:
    """tokenizer.json or qwen.tiktoken, and what lies beside it in the folder `path`; raises `CheckpointError`."""
    source, ranks = path / "tokenizer.json", path / tiktoken.FILE_NAME
    if not source.is_file() and not ranks.is_file():
        old = " (tokenizer.model alone is not read: save the model with transformers once)"
        has_old = (path / "tokenizer.model").exists()
        raise CheckpointError(f"{path} has no tokenizer.json{old if has_old else ''}; put it beside config.json")
    settings = _read_json(path / "tokenizer_config.json") or {}
    return TokenizerData(
        path,
        json=_read_text(source) if source.is_file() else None,
        ranks=() if source.is_file() else tiktoken.read_ranks(ranks),
        settings=settings,
        generation_config=_generation_config(path),
        chat_templates=_chat_templates(path, settings),
    )


def _generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json, in which `eos_token_id` has all tokens that end an answer.

    These are what this file, config.json and the tokenizer name: fine-tuned models often have the right one in a
    single place.
    """
    found = _read_ids(path / "generation_config.json")
    config = _read_ids(path / "config.json")
    if (path / tiktoken.FILE_NAME).is_file() and not (path / "tokenizer.json").is_file():
        return found or config  # its tokens have no other names
    ends = [_tokenizer_eos(path), *_as_list(found.get("eos_token_id")), *_as_list(config.get("eos_token_id"))]
    if known := list(dict.fromkeys(end for end in ends if end is not None)):
        found["eos_token_id"] = known
    if found.get("bos_token_id") is None and config.get("bos_token_id") is not None:
        found["bos_token_id"] = config["bos_token_id"]
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tokenizer_eos(path: Path) -> int | None:
    """The id of tokenizer_config.json's `eos_token`; None if there is none."""
    settings = _read_json(path / "tokenizer_config.json") or {}
    text = settings.get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    if not isinstance(text, str) or not text:
        return None
    decoder = settings.get("added_tokens_decoder")
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == text and index.isdecimal() and len(index) < 10:
            return int(index)
    tokenizer = _read_json(path / "tokenizer.json") or {}
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("content") == text and type(entry.get("id")) is int:
            return int(entry["id"])
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    number = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return number if type(number) is int else None


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own goes before tokenizer_config.json, as in transformers."""
    if (file := path / "chat_template.jinja").is_file():
        return {"default": _read_text(file)}
    given = settings.get("chat_template")
    if given is None:
        given = (_read_json(path / "chat_template.json") or {}).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    templates: dict[str, str] = {}
    for entry in given if isinstance(given, list) else [] if given is None else [given]:
        name, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(template, str):
            where = path / "tokenizer_config.json"
            raise CheckpointError(
                f"{where}: chat_template is neither a text nor a list of named templates; fetch it again"
            )
        templates[name] = template
    return templates


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it."""
    if (path / _INDEX).is_file():
        return _open_shards(path)
    found = sorted(path.glob("*.safetensors"))
    if (single := path / "model.safetensors").is_file():
        found = [single]
    if len(found) == 1:
        file = SafetensorsFile(found[0])
        return dict.fromkeys(file.tensors, file)
    if found:
        raise CheckpointError(f"{path} has {len(found)} safetensors files but no {_INDEX}; fetch that file too")
    hint = "convert its .bin or .pth files to safetensors" if any(path.glob("*.bin")) else "fetch the weights too"
    raise CheckpointError(f"{path} has no safetensors files; {hint}, or name a .gguf file")


def _open_shards(path: Path) -> dict[str, SafetensorsFile]:
    weight_map = (_read_json(path / _INDEX) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / _INDEX} has no weight_map from tensors to files; fetch it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path / _INDEX} names {outside[0]!r}, which is not a file of its own folder")
    if missing := [name for name in names if not os.path.isfile(path / name)]:  # noqa: PTH113 -- names of any kind
        raise CheckpointError(f"{path} lacks {', '.join(missing)} of its {len(names)} shards; fetch them again")
    files = {name: SafetensorsFile(path / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{path / name} lacks tensor {tensor!r}, which {_INDEX} places there; fetch it again")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _read_ids(path: Path) -> dict[str, Any]:
    """The object in `path`, whose token ids and numbers for sampling are of the right types; empty if there is none."""
    content = _read_json(path) or {}
    for name, value in content.items():
        if name in _NUMBERS and not (value is None or _is_number(value)):
            raise CheckpointError(f"{path}: {name} is {value!r:.100}; it must be a number that fits 32 bits")
        if name in _INTEGERS and not (value is None or (type(value) is int and abs(value) < 1 << 31)):
            raise CheckpointError(f"{path}: {name} is {value!r:.100}; it must be an integer that fits 32 bits")
        whole = all(type(token) is int and abs(token) < 1 << 31 for token in _as_list(value))
        if name in _TOKEN_IDS and not whole:
            raise CheckpointError(f"{path}: {name} is {value!r:.100}; it must be a token id or a list of them")
    return content


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise CheckpointError(
                f"{path} has more than {_MOST_TEXT} bytes, which is no text of a model; fetch it again"
            )
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        what = described(path.read_bytes()[:64])
        raise CheckpointError(f"{path} is {what or f'no text ({error}); fetch it again'}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; make it readable") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no such file."""
    if not path.is_file():
        return None
    text = _read_text(path)
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a character may be escaped, but is no text
    except (ValueError, RecursionError) as error:
        what = described(text[:64].encode("utf-8", "replace"))
        raise CheckpointError(
            f"{path} is {what}" if what else f"{path} is not JSON ({error}); fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content
