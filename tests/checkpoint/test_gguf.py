"""Reading GGUF:

the real model, files written here by an independent writer (the `gguf` package), damaged files.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.gguf import BLOCK_SIZES, GgufFile
from octavo.checkpoint.gguf_model import GgufCheckpoint
from octavo.errors import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 64


def write_model(path: Path, arch: str = "llama", **changes: Any) -> dict[str, np.ndarray]:
    """A model of one layer;

    returns its tensors in Hugging Face's order. `changes` are metadata or extra tensors.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "<eot>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_eos_token_id(2)
    for key, value in changes.get("metadata", {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    shapes = {
        "model.embed_tokens.weight": (4, WIDTH),
        "model.norm.weight": (WIDTH,),
        "model.layers.0.input_layernorm.weight": (WIDTH,),
        "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH),
        "model.layers.0.mlp.gate_proj.weight": (96, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (96, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, 96),
    } | changes.get("tensors", {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 1)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        heads = {"q": HEADS, "k": KV_HEADS}.get(stored.removeprefix("blk.0.attn_")[:1])
        out = tensor
        if arch == "llama" and heads and stored.split(".")[2] in ("attn_q", "attn_k"):
            # As llama.cpp's converter does it.
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            out = halves.swapaxes(1, 2).reshape(tensor.shape)
        quantized = changes.get("quantize")
        if quantized is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(stored, gguf.quants.quantize(out, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored, out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_of_hugging_face(tmp_path: Path, arch: str) -> None:
    extra: dict[str, Any] = {}
    if arch == "qwen2":
        extra = {f"model.layers.0.self_attn.{x}_proj.bias": (n * HEAD_DIM,) for x, n in (("q", 4), ("k", 2), ("v", 2))}
    if arch == "qwen3":
        extra = {f"model.layers.0.self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    tensors = write_model(tmp_path / "m.gguf", arch, tensors=extra | {"lm_head.weight": (4, WIDTH)})
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        assert checkpoint.tensors[name].dtype == "F32"
        np.testing.assert_array_equal(checkpoint.read(name).view(np.float32).reshape(tensor.shape), tensor, name)
    expected = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    assert checkpoint.config["architectures"] == [expected[arch]]
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.config["attention_bias"] is (arch == "qwen2")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_rows_of_quantized_q_and_k_come_back_in_order(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    tensors = write_model(tmp_path / "m.gguf", quantize=kind)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        expected = gguf.quants.quantize(tensors[name], kind)
        np.testing.assert_array_equal(checkpoint.read(name), expected.reshape(-1))
        assert checkpoint.tensors[name].dtype == kind.name
        assert checkpoint.tensors[name].num_bytes == expected.size


def test_block_sizes_are_ggmls() -> None:
    for word, sizes in BLOCK_SIZES.items():
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[word]], word


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any] | None) -> None:
    write_model(tmp_path / "m.gguf", metadata=metadata)
    assert open_checkpoint(str(tmp_path / "m.gguf")).config["rope_scaling"] == expected


def test_rope_factors_of_llama3_are_a_list(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m.gguf", tensors={"rope_freqs.weight": (HEAD_DIM // 2,)})
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.config["rope_scaling"]["rope_type"] == "freq_factors"
    assert checkpoint.config["rope_scaling"]["factors"] == tensors["rope_freqs.weight"].tolist()
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_end_of_turn_is_an_end(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 3})
    assert open_checkpoint(str(tmp_path / "m.gguf")).generation_config == {"eos_token_id": [2, 3]}


def test_control_tokens_that_end_a_turn_are_ends(tmp_path: Path) -> None:
    """By their text, whatever the file calls its EOS; a word that looks like one is none."""
    tokens = ["a", "<|im_end|>", "<s>", "<|endoftext|>", "<|eot_id|>", "<|im_start|>"]
    arrays = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 3, 3, 3, 1, 3]}
    write_model(tmp_path / "m.gguf", metadata={**arrays, "tokenizer.ggml.eos_token_id": 2})
    assert open_checkpoint(str(tmp_path / "m.gguf")).generation_config == {"eos_token_id": [2, 1, 3]}


def test_the_default_model(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2_path))
    assert (
        checkpoint.config
        | {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        == checkpoint.config
    )
    assert len(checkpoint.tensors) == 272
    assert sum(tensor.num_bytes for tensor in checkpoint.tensors.values()) == 98362432 - 1785664
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


def test_metadata_equals_the_reference_reader(smollm2_path: Path) -> None:
    ours = GgufFile(smollm2_path)
    reference = gguf.GGUFReader(smollm2_path)
    for key, value in ours.metadata.items():
        # Decoding 98,000 strings one by one takes the reference reader long; its ends are enough.
        field = reference.fields[key]
        if isinstance(value, list) and len(value) > 1000:
            assert len(field.data) == len(value)
            assert [field.contents(i) for i in (0, 777, -1)] == [value[i] for i in (0, 777, -1)]
        else:
            assert field.contents() == value
    for tensor in reference.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def damage(path: Path, edit: Any) -> str:
    """The error of a file after `edit` changed its bytes."""
    data = bytearray(path.read_bytes())
    path.write_bytes(edit(data))
    with pytest.raises(CheckpointError) as raised:
        GgufCheckpoint(path)
    text = str(raised.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path)
    whole = path.read_bytes()
    for size in [1, 3, 4, 7, 8, 20, 24, 30, 60, 100, *range(200, len(whole), 997), len(whole) - 33]:
        assert "cut short" in damage(path, lambda _, size=size: whole[:size]) or size < 4
    assert "empty" in damage(path, lambda _: b"")


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path)
    whole = path.read_bytes()
    assert "not a GGUF file" in damage(path, lambda _: b"XXXX" + whole[4:])
    assert "version 1;" in damage(path, lambda _: whole[:4] + b"\x01\0\0\0" + whole[8:])
    assert "big endian" in damage(path, lambda _: whole[:4] + b"\0\0\0\x03" + whole[8:])
    assert "it claims" in damage(path, lambda _: whole[:8] + b"\xff" * 7 + b"\x0f" + whole[16:])
    place = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    text = damage(path, lambda _: whole[:place] + (16).to_bytes(4, "little") + whole[place + 4 :])
    assert "'token_embd.weight'" in text
    assert "IQ2_XXS" in text
    assert "Q4_K" in text


def test_numbers_that_cannot_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path)
    whole = path.read_bytes()
    place = whole.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    assert "llama.attention.head_count as 0" in damage(path, lambda _: whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
    path.write_bytes(whole[:place] + b"\x03" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match=r"attn_q\.weight 64 rows for 3 heads"):
        GgufCheckpoint(path).read("model.layers.0.self_attn.q_proj.weight")


WRONG_TYPES: dict[str, list[Any]] = {
    "tokenizer.ggml.tokens": [3, "abc", [1, 2], [0.5]],
    "tokenizer.ggml.merges": [3, [1]],
    "tokenizer.ggml.token_type": ["x", ["1"], [0.5], True],
    "tokenizer.ggml.scores": [1.5, ["x"]],
    "tokenizer.ggml.model": [3, ["gpt2"]],
    "tokenizer.ggml.pre": [3, ["qwen2"]],
    "tokenizer.ggml.eos_token_id": ["2", [2], 2.0, -1, True],
    "tokenizer.ggml.eot_token_id": ["2", [2], 2.5],
    "tokenizer.ggml.add_bos_token": ["yes", 1, [True]],
    "llama.expert_count": ["none", [0]],
    "llama.rope.freq_base": ["1e4", [1e4], float("nan"), float("inf")],
    "llama.rope.scaling.type": [1, ["yarn"]],
    "llama.rope.scaling.factor": ["2", [2.0]],
    "llama.attention.key_length": ["16", 16.5, [16]],
    "split.count": ["2", [1], 1.5],
    "general.alignment": ["32", [32], 0, 1.5],
    "general.architecture": [3, ["llama"]],
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_values_of_a_wrong_type_are_named(tmp_path: Path, key: str) -> None:
    """Once, when the file is opened, so that whoever reads a value meets none."""
    from tests.fuzz.originals import Value, gguf_byte_level, gguf_sentencepiece

    path = tmp_path / "m.gguf"
    kinds = {str: 8, int: 5, float: 6, bool: 7}
    for wrong in WRONG_TYPES[key]:
        made = gguf_sentencepiece() if "scores" in key or "llama" in key else gguf_byte_level()
        made.keys = [entry for entry in made.keys if entry[0] != key]
        many = isinstance(wrong, list)
        value = Value(9, wrong, kinds[type(wrong[0])]) if many else Value(kinds[type(wrong)], wrong)
        made.keys.append((key, value))
        path.write_bytes(made.write())
        text = damage(path, bytes)
        assert key in text or key in ("split.count", "general.architecture"), text


@pytest.mark.parametrize(
    ("move", "words"), [(8, "no multiple of 32"), (-32, "over each other"), (1 << 62, "cut short")]
)
def test_tensors_that_lie_wrongly(tmp_path: Path, move: int, words: str) -> None:
    from tests.fuzz.originals import gguf_byte_level

    made = gguf_byte_level()
    made.entries[3].offset += move
    (tmp_path / "m.gguf").write_bytes(made.write())
    assert words in damage(tmp_path / "m.gguf", bytes)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_counts_are_checked_against_the_file_before_anything_is_made(tmp_path: Path, count: int) -> None:
    from tests.fuzz.originals import gguf_byte_level

    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        made = gguf_byte_level()
        dict(made.keys)[key].count = count
        (tmp_path / "m.gguf").write_bytes(made.write())
        assert "cut short" in damage(tmp_path / "m.gguf", bytes)


def test_an_unknown_architecture_or_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path)
    whole = path.read_bytes()
    assert "'llamb'" in damage(path, lambda _: whole.replace(b"llama", b"llamb", 1))
    assert "'blk.0.ffn_gatx.weight'" in damage(path, lambda _: whole.replace(b"ffn_gate", b"ffn_gatx"))


def test_reading_loads_no_torch(smollm2_path: Path) -> None:
    code = (
        "import sys; from octavo.checkpoint import open_checkpoint; from octavo.text.tokenizer import "
        "Tokenizer;"
        "from octavo.text import output;"
        f"c = open_checkpoint({str(smollm2_path)!r}); Tokenizer.from_checkpoint(c).encode('a');"
        "assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
