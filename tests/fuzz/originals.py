"""Small whole models, one of each kind of file that is read: what mutants are made from.

GGUF is written here and not by the `gguf` package, since a mutant may hold what no honest writer writes.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.tiny_models import save_model, write_tiny_qwen_v1

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 288}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALIGNMENT = 32


def write_all(folder: Path) -> dict[str, Path]:
    """Kind -> the folder or file of a whole model, as a user would name it."""
    return {
        "llama": _llama(folder / "llama"),
        "qwen2": _qwen2(folder / "qwen2"),
        "qwen3": _qwen3(folder / "qwen3"),
        "unigram": _other_tokenizer(folder / "unigram", _unigram(), "float16"),
        "wordpiece": _other_tokenizer(folder / "wordpiece", _wordpiece(), "bfloat16"),
        "qwen": write_tiny_qwen_v1(folder / "qwen", hidden_size=32, kv_channels=8, num_hidden_layers=1),
        "gguf": _write_gguf(folder / "gguf", gguf_byte_level()),
        "gguf-sentencepiece": _write_gguf(folder / "gguf-sentencepiece", gguf_sentencepiece()),
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False))


def _llama(folder: Path) -> Path:
    """One file, byte-level BPE, a template in tokenizer_config.json; what config.json may say besides."""
    save_model(folder, "Llama", **SMALL, bos_token_id=0, eos_token_id=2)
    _byte_level().save(str(folder / "tokenizer.json"))
    decoder = {
        str(256 + i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, text in enumerate(SPECIAL)
    }
    names = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2], "lstrip": False}, "pad_token": SPECIAL[0]}
    settings = {"added_tokens_decoder": decoder, **names, "chat_template": CHATML, "model_max_length": 128}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", names)
    generation = {"eos_token_id": [2, 258], "temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": True}
    _write_json(folder / "generation_config.json", {**generation, "repetition_penalty": 1.1, "max_new_tokens": 8})
    return folder


def _qwen2(folder: Path) -> Path:
    """Two shards, SentencePiece-like BPE, named templates, a window and scaled positions."""
    from safetensors.torch import load_file, save_file

    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    save_model(folder, "Qwen2", **SMALL, rope_scaling=scaling, use_sliding_window=True, sliding_window=32)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in (0, 1):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        names = sorted(tensors)[part::2]
        save_file({tensor: tensors[tensor] for tensor in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    _sentencepiece().save(str(folder / "tokenizer.json"))
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML}]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": templates}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1})
    return folder


def _qwen3(folder: Path) -> Path:
    """A template in a file of its own, Llama 3's scaling, a head width that config.json gives."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32, "rope_theta": 5e5}
    save_model(folder, "Qwen3", **SMALL, head_dim=16, rope_scaling=scaling, tie_word_embeddings=True)
    _byte_level().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"eos_token": SPECIAL[2]})
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def _other_tokenizer(folder: Path, tokenizer: Tokenizer, dtype: str) -> Path:
    """The kinds that few models have, with weights of 16 bits."""
    save_model(folder, "Llama", **SMALL, dtype=dtype, rope_scaling={"rope_type": "linear", "factor": 2.0})
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "chat_template.json", {"chat_template": CHATML})
    return folder


def _unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁h", -1.5), ("ello", -1.0)]
    tokenizer = Tokenizer(
        models.Unigram([*pieces, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>|/")], 0)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken(text, rstrip=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=0, pad_token="<unk>")
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "hello",
        "he",
        "##llo",
        "##l",
        "##o",
        "h",
        "user",
        "<",
        ">",
        "|",
        "im",
        "_",
        "end",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits()])
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_tokens([AddedToken("user", single_word=True)])
    return tokenizer


def _byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    for left, right in (("l", "o"), ("h", "e"), ("he", "l")):
        vocabulary[left + right] = len(vocabulary) + len(SPECIAL)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("l", "o"), ("h", "e"), ("he", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "he", "lo"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("h", "e"), ("l", "o")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in tokens[:3]])
    return tokenizer


# ---- GGUF ---------------------------------------------------------------------------------------------------------

# Value types of the format: number -> struct code; 8 is a text, 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, TEXT, ARRAY = 4, 6, 7, 8, 9


@dataclass
class Value:
    """A value of the type `kind`; an array's items are of the type `item`, and it claims `count` of them."""

    kind: int
    value: Any
    item: int = 0
    count: int | None = None

    def write(self) -> bytes:
        if self.kind != ARRAY:
            return _scalar(self.kind, self.value)
        items = b"".join(_scalar(self.item, item) for item in self.value)
        return struct.pack("<IQ", self.item, len(self.value) if self.count is None else self.count) + items


@dataclass
class Entry:
    """A row of the tensor table; `dims` innermost first, as the file has them."""

    name: str
    dims: list[int]
    dtype: int
    offset: int


@dataclass
class Gguf:
    keys: list[tuple[str, Value]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    num_entries: int | None = None
    num_keys: int | None = None

    def add(self, name: str, tensor: np.ndarray, dtype: int = 0, width: int | None = None) -> None:
        """A tensor of fp32, or of bytes that another type stores rows of `width` elements in."""
        dims = list(reversed(tensor.shape))
        self.entries.append(Entry(name, [width or dims[0], *dims[1:]], dtype, len(self.data)))
        self.data += tensor.tobytes()
        self.data += bytes(-len(self.data) % ALIGNMENT)

    def write(self) -> bytes:
        counts = (
            len(self.entries) if self.num_entries is None else self.num_entries,
            len(self.keys) if self.num_keys is None else self.num_keys,
        )
        header = b"GGUF" + struct.pack("<IQQ", self.version, *(count & (2**64 - 1) for count in counts))
        for key, value in self.keys:
            header += _text(key) + struct.pack("<I", value.kind) + value.write()
        for entry in self.entries:
            dims = struct.pack(f"<I{len(entry.dims)}Q", len(entry.dims), *(dim & (2**64 - 1) for dim in entry.dims))
            header += _text(entry.name) + dims + struct.pack("<IQ", entry.dtype, entry.offset & (2**64 - 1))
        return header + bytes(-len(header) % ALIGNMENT) + self.data


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: int, value: Any) -> bytes:
    """`value` as the type `kind`, whatever it is; a type that does not exist has no bytes."""
    if kind == TEXT:
        return _text(str(value))
    if kind not in SCALARS:
        return b""
    code = SCALARS[kind]
    if isinstance(value, (str, list)):
        value = len(value)
    if code == "f":
        return np.float32(value).tobytes()
    if code == "d":
        return struct.pack("<d", value)
    if value != value or value in (float("inf"), float("-inf")):
        value = -1
    size = struct.calcsize(code)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little") if code != "?" else bytes([bool(value)])


def _common(arch: str, tokens: Sequence[str], types: Sequence[int]) -> list[tuple[str, Value]]:
    keys = [("general.architecture", Value(TEXT, arch)), ("general.alignment", Value(U32, ALIGNMENT))]
    numbers = {"context_length": 128, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    keys += [(f"{arch}.{name}", Value(U32, number)) for name, number in numbers.items()]
    keys += [(f"{arch}.attention.layer_norm_rms_epsilon", Value(F32, 1e-5))]
    keys += [(f"{arch}.rope.freq_base", Value(F32, 1e4))]
    keys += [("tokenizer.ggml.tokens", Value(ARRAY, list(tokens), TEXT))]
    keys += [("tokenizer.ggml.token_type", Value(ARRAY, list(types), 5))]
    return [*keys, ("tokenizer.chat_template", Value(TEXT, CHATML))]


def _tensors(gguf: Gguf, num_tokens: int, q4_1: bool) -> None:
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (num_tokens, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes["blk.0.ffn_down"] = (32, 64)
    for name, shape in shapes.items():
        if q4_1 and len(shape) == 2:
            blocks = draw.integers(0, 255, (shape[0], shape[1] // 32, 20), np.uint8)
            blocks[:, :, :4] = np.full(2, 0.05, np.float16).view(np.uint8)
            gguf.add(f"{name}.weight", blocks.reshape(shape[0], -1), 3, shape[1])
        else:
            gguf.add(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))


def gguf_byte_level() -> Gguf:
    """A Qwen2 in fp32 with biases, byte-level BPE."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "lo", "he", *SPECIAL]
    gguf = Gguf(_common("qwen2", tokens, [1] * 258 + [3] * 3))
    gguf.keys += [
        ("tokenizer.ggml.model", Value(TEXT, "gpt2")),
        ("tokenizer.ggml.pre", Value(TEXT, "qwen2")),
        ("tokenizer.ggml.merges", Value(ARRAY, ["l o", "h e"], TEXT)),
        ("tokenizer.ggml.eos_token_id", Value(U32, 260)),
        ("tokenizer.ggml.add_bos_token", Value(BOOL, False)),
    ]
    _tensors(gguf, len(tokens), q4_1=False)
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        gguf.add(f"blk.0.attn_{name}.bias", np.zeros(rows, np.float32))
    return gguf


def gguf_sentencepiece() -> Gguf:
    """A Llama in Q4_1 with factors on its positions, SentencePiece."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "he", "▁he"]
    gguf = Gguf(_common("llama", tokens, [2, 3, 3] + [6] * 256 + [1] * 7))
    gguf.keys += [
        ("tokenizer.ggml.model", Value(TEXT, "llama")),
        ("tokenizer.ggml.scores", Value(ARRAY, [0.0] * 259 + [-float(i) for i in range(7)], F32)),
        ("tokenizer.ggml.bos_token_id", Value(U32, 1)),
        ("tokenizer.ggml.eos_token_id", Value(U32, 2)),
        ("tokenizer.ggml.unknown_token_id", Value(U32, 0)),
        ("tokenizer.ggml.add_space_prefix", Value(BOOL, True)),
        ("llama.rope.scaling.type", Value(TEXT, "none")),
    ]
    _tensors(gguf, len(tokens), q4_1=True)
    gguf.add("rope_freqs.weight", np.ones(4, np.float32))
    return gguf


def _write_gguf(folder: Path, gguf: Gguf) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(gguf.write())
    return folder / "model.gguf"
