"""Safetensors files and Hugging Face folders: files of the reference library, and damaged ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from octavo.checkpoint import open_checkpoint, open_tokenizer_data
from octavo.checkpoint.safetensors import SafetensorsFile, header_size, parse_header
from octavo.errors import CheckpointError

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16),
    "scalar": np.array(3, np.int64),
    "none": np.zeros((0, 4), np.float32),
}


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in file.tensors.items()} == {
        "a": ("F32", (3, 4)),
        "b": ("F16", (6,)),
        "scalar": ("I64", ()),
        "none": ("F32", (0, 4)),
    }
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(file.read(name).view(tensor.dtype).reshape(tensor.shape), tensor)


def header(entries: dict[str, Any]) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "size", "words"),
    [
        (b"{", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b"[]", 0, "not a JSON object"),
        (header({"x": 3}), 0, "'x' wrongly"),
        (header({"x": {"dtype": "F32"}}), 0, "'x' wrongly"),
        (header({"x": entry(shape=[-2])}), 8, "'x' wrongly"),
        (header({"x": entry(shape=[True, 2])}), 8, "'x' wrongly"),
        (header({"x": entry(offsets=[0])}), 8, "'x' wrongly"),
        (header({"x": entry(dtype="F4")}), 8, "type F4"),
        (header({"x": entry(shape=[3])}), 8, "8 bytes; F32 of shape [3] takes 12"),
        (header({"x": entry(), "y": entry()}), 8, "'y' at byte 0 where 8"),
        (header({"x": entry(), "y": entry(offsets=[12, 20])}), 20, "'y' at byte 12 where 8"),
        (header({"x": entry()}), 4, "cut short"),
        (header({"x": entry()}), 12, "belong to no tensor"),
    ],
)
def test_a_wrong_header_is_named(content: bytes, size: int, words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_header(content, "file.safetensors", size)
    assert words in str(raised.value)
    assert str(raised.value).startswith("file.safetensors ")


@given(st.binary(max_size=300))
def test_noise_is_a_checkpoint_error(data: bytes) -> None:
    try:
        size = header_size(data[:8], "noise")
        parse_header(data[8 : 8 + size], "noise", max(0, len(data) - 8 - size))
    except CheckpointError:
        pass


def test_a_header_alone_is_enough(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    size = header_size(data[:8], "url")
    assert parse_header(data[8 : 8 + size], "url")["a"].shape == (3, 4)


@pytest.mark.parametrize("size", [0, 5, 8, 30, -1])
def test_a_cut_file_is_an_error(tmp_path: Path, size: int) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"cut short|is empty"):
        SafetensorsFile(tmp_path / "m.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two shards."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


DECODER = {"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}}}


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>", **DECODER}}, [7, 1, 2]),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}, **DECODER}}, [7, 1, 2]),
        (
            {"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": {"added_tokens": [{"id": 9, "content": "<e>"}]}},
            [9, 1, 2],
        ),
        ({"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": {"model": {"vocab": {"a": 0, "<e>": 4}}}}, [4, 1, 2]),
        ({"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": {"model": {"vocab": [["<e>", -1.0]]}}}, [1, 2]),
        (
            {"tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": [3]}, "tokenizer": {"added_tokens": 3}},
            [1, 2],
        ),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 5}}, [1, 2, 5]),
        ({"config": {"eos_token_id": [2, 6]}}, [1, 2, 6]),
        ({"config": {"eos_token_id": 5}, "generation_config": {}}, [5]),
        ({"config": {"eos_token_id": None}, "generation_config": {}}, None),
    ],
)
def test_ends_are_those_that_any_file_names(folder: Path, files: dict[str, Any], ends: list[int] | None) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert open_checkpoint(str(folder)).generation_config.get("eos_token_id") == ends


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == {"architectures": ["LlamaForCausalLM"]}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.tensors["b"].num_bytes == 12
    np.testing.assert_array_equal(checkpoint.read("b").view(np.float16), TENSORS["b"])


def test_shards_that_are_missing_are_all_named(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks one\.safetensors, two\.safetensors of its 2 shards"):
        open_checkpoint(str(folder))
    assert open_checkpoint(str(folder), weights=False).tensors == {}


def test_an_index_that_lies_is_an_error(folder: Path) -> None:
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors lacks tensor 'b'"):
        open_checkpoint(str(folder))
    write_index(folder, {"a": "../one.safetensors"})
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        open_checkpoint(str(folder))
    write_index(folder, ["a"])
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(str(folder))


def test_what_a_folder_lacks_is_said(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(str(folder))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"convert its \.bin"):
        open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        open_checkpoint(str(folder), weights=False).tokenizer_data()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        open_checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(folder))


def test_an_unknown_name_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"known name \(smollm2:135m\).*Did you mean 'smollm2:135m'\?"):
        open_checkpoint("smollm2:135")
    with pytest.raises(CheckpointError, match="ORG/NAME of a hub"):
        open_checkpoint("Llama-3.2-1B")
    (tmp_path / "model.txt").touch()
    with pytest.raises(CheckpointError, match=r"not a \.gguf one"):
        open_checkpoint(str(tmp_path / "model.txt"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot'"),
        ('{"top_p": [1]}', "top_p is [1]"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"repetition_penalty": 1e308}', "repetition_penalty is 1e+308"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature is 1000"),
        ('{"top_k": 4294967296}', "top_k is 4294967296"),
        ('{"top_k": 1.5}', "top_k is 1.5"),
        ('{"eos_token_id": 2.5}', "eos_token_id is 2.5"),
        ('{"eos_token_id": [[2]]}', "eos_token_id is [[2]]"),
        ('{"eos_token_id": {"a": 1}}', "eos_token_id is {'a': 1}"),
        ('{"bos_token_id": true}', "bos_token_id is True"),
        ("[1]", "holds no JSON object"),
        ('{"a": ["\\uD800"]}', "is not JSON ('utf-8' codec can't encode"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_generation_config_that_is_none(folder: Path, content: str, words: str) -> None:
    (folder / "generation_config.json").write_text(content)
    (folder / "tokenizer.json").write_text("{}")
    for read in (open_checkpoint, open_tokenizer_data):
        with pytest.raises(CheckpointError) as raised:
            read(str(folder))
        assert words in str(raised.value)


@pytest.mark.parametrize("name", ["a\nb", "\0", "x" * 5000, "", "..", "é" * 300])
def test_shards_of_impossible_names(folder: Path, name: str) -> None:
    write_index(folder, {"w": name})
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(str(folder))
    assert len(str(raised.value).splitlines()) == 1


def test_a_shape_of_a_million_dimensions_is_not_multiplied() -> None:
    entries = {"a": {"dtype": "F32", "shape": [2**62] * 1_000_000, "data_offsets": [0, 8]}}
    with pytest.raises(CheckpointError, match="describes tensor 'a' wrongly"):
        parse_header(json.dumps(entries).encode(), "m.safetensors")
