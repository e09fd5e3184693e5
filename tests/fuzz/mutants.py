"""Damaged copies of small models: `make` gives the mutant of a seed and a number, always the same.

A mutant differs from its original in one file, at one to three places: bytes, a value of JSON, a key or a tensor of
GGUF, a line of a vocabulary, the source of a template.
"""

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.originals import ARRAY, SCALARS, TEXT, Gguf, Value, gguf_byte_level, gguf_sentencepiece

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
]
FLOATS = [0.0, -0.5, 0.5, 1.5, 1e-45, 1e-308, 1e308, -1e308]
# Texts of JSON that no Python value gives.
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    '{"a": 1, "a": []}',
]
RAW += ["[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500, "[" * 100_000 + "]" * 100_000, "[" * 60 + "]" * 60]
PLAIN = [None, True, False, "", "x", "0", " ", "\n", "\0", "é" * 50, "a" * 100_000, [], {}, [[]], [None], {"": None}]
PLAIN += [[0] * 1000, ["a", 1, None], {"content": None}, {"type": "Sequence"}, [{"name": "default"}], [[1, 2], [3]]]
PLAIN += ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "QWenLMHeadModel"]
PLAIN += ["bfloat16", "float16", "linear", "yarn", "llama3", "dynamic", "freq_factors", "silu", "default", "tool_use"]
PLAIN += ["I32", "I64", "F64", "F32", "F16", "BF16", "F8_E4M3", "U8", "BOOL", "full_attention", "sliding_attention"]
PLAIN += ["BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Metaspace", "Split", "Replace", "Strip", "Fuse"]
PLAIN += ["[", "\\p{L}+", "Isolated", "first", "never", "Sequence", "TemplateProcessing", "▁", "<0x00>", "$A"]
HOSTILE = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxx{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1, 2]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ ('x' * 10000) | replace('x', 'y' * 1000000) }}",
    "{{ range(100000) | join('x' * 100000) }}",
    "{{ ('x\n' * 100000) | indent(100000) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ 1 / 0 }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ messages[0].content.format }}{{ '{0.__class__}'.format(1) }}",
    "{{ self }}{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% if x %}" * 300 + "{% endif %}" * 300,
    "{{ strftime_now('%' * 100000) }}{{ strftime_now(1) }}",
    "{{ raise_exception('a\nb') }}",
]


class Mutant:
    """`path` is what a user would name; `what` says what was done, for a person."""

    def __init__(self, path: Path, what: str):
        self.path = path
        self.what = what


def make(originals: dict[str, Path], folder: Path, seed: int, number: int) -> Mutant:
    """Writes mutant `number` of `seed` into `folder`, which is emptied first."""
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choice(list(originals))
    shutil.rmtree(folder, ignore_errors=True)
    original = originals[kind]
    if original.is_file():
        folder.mkdir(parents=True)
        path = folder / original.name
        return Mutant(path, f"{kind}: {_mutate_gguf(draw, kind, original, path)}")
    shutil.copytree(original, folder)
    # Weights are the largest files and have the smallest headers.
    names = sorted(path.name for path in folder.iterdir())
    weights = [9 if name.endswith(("config.json", "tokenizer.json")) else 4 for name in names]
    (name,) = draw.choices(names, weights)
    return Mutant(folder, f"{kind}: {name}: {_mutate_file(draw, folder / name)}")


def _mutate_file(draw: random.Random, path: Path) -> str:
    raw = path.read_bytes()
    if draw.random() < 0.03:
        path.unlink()
        return _no_file(draw, path)
    structured = {".json": _json_text, ".safetensors": _header, ".tiktoken": _lines, ".jinja": _template}[path.suffix]
    mutate = structured if draw.random() < 0.75 else _bytes
    what = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            raw, did = mutate(draw, raw)
        except (ValueError, RecursionError):  # a second mutation may find no JSON any more
            break
        what.append(did)
    path.write_bytes(raw)
    return ", ".join(what)


def _no_file(draw: random.Random, path: Path) -> str:
    kind = draw.choice(("removed", "a folder", "a FIFO", "a link to itself", "a link to a device", "empty", "huge"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a link to a device":
        path.symlink_to("/dev/zero")
    elif kind != "removed":
        path.touch()
        os.truncate(path, 1 << 40 if kind == "huge" else 0)
    return f"is {kind}"


# ---- bytes --------------------------------------------------------------------------------------------------------


def _bytes(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    size = len(raw)
    # Headers stand at the beginning.
    at = draw.randrange(max(1, draw.choice((16, 64, 512, 4096, size)))) % max(1, size)
    kind = draw.choice(("flip", "cut", "insert", "drop", "count", "repeat", "append"))
    if kind == "flip":
        changed = bytearray(raw or b"\0")
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            changed[draw.randrange(at, min(len(changed), at + 64))] ^= 1 << draw.randrange(8)
        return bytes(changed), f"bits flipped from byte {at}"
    if kind == "cut":
        return raw[:at], f"cut at byte {at}"
    if kind == "insert":
        new = draw.choice((b"\0", b"\xff", b"\n", b'"', b"{", draw.randbytes(draw.randrange(1, 40))))
        return raw[:at] + new + raw[at:], f"{new!r} inserted at byte {at}"
    if kind == "drop":
        count = draw.choice((1, 2, 8, 100))
        return raw[:at] + raw[at + count :], f"{count} bytes dropped at byte {at}"
    if kind == "count":
        code, number = draw.choice("BIQ"), draw.choice(NUMBERS)
        new = (number % 2 ** (8 * struct.calcsize(code))).to_bytes(struct.calcsize(code), "little")
        return raw[:at] + new + raw[at + len(new) :], f"{new!r} written over byte {at}"
    if kind == "repeat":
        return raw[:at] + raw[at : at + 64] * 20 + raw[at + 64 :], f"64 bytes repeated at byte {at}"
    return raw + raw[: draw.choice((1, 10, 1000))], "bytes appended"


# ---- JSON ---------------------------------------------------------------------------------------------------------


def _json_text(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    text, what = _json(draw, raw.decode())
    return text.encode(), what


def _json(draw: random.Random, text: str) -> tuple[str, str]:
    tree = json.loads(text)
    place = _place(draw, tree)
    if place is None:
        return draw.choice(RAW), "replaced as a whole"
    holder, key, name = place
    if draw.random() < 0.25 and isinstance(holder[key], str) and "{%" in holder[key]:
        holder[key] = draw.choice(HOSTILE)
        return json.dumps(tree), f"{name} = {holder[key][:80]!r}"
    action = draw.choice(
        ("value", "value", "value", "number", "number", "raw", "remove", "other", "wrap", "double", "rename")
    )
    if action == "remove":
        del holder[key]
        return json.dumps(tree), f"{name} removed"
    if action == "rename" and isinstance(holder, dict):
        new = draw.choice(("", "x", "0", "-1", str(2**70), "None", key + " "))
        holder[new] = holder.pop(key)
        return json.dumps(tree), f"{name} is now called {new!r}"
    if action == "raw":
        holder[key] = "@raw@"
        new = draw.choice(RAW)
        return json.dumps(tree).replace('"@raw@"', new), f"{name} = {new[:60]}"
    if action == "number":
        holder[key] = draw.choice(NUMBERS + FLOATS)
    elif action == "other" and (other := _place(draw, tree)) is not None:
        holder[key] = copy.deepcopy(other[0][other[1]])
    elif action == "wrap":
        old = holder[key]
        holder[key] = draw.choice(([old], {"a": old}, [old, old], str(old), [old] * 50))
    elif action == "double" and isinstance(holder[key], (list, str)):
        holder[key] = holder[key] + holder[key]
    elif action == "double" and isinstance(holder[key], (int, float)):
        half = holder[key] / 2 if abs(holder[key]) < 2**53 else holder[key] // 2  # a float may be too small for it
        holder[key] = draw.choice((holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], half))
    else:
        holder[key] = copy.deepcopy(draw.choice(PLAIN))
    return json.dumps(tree), f"{name} = {json.dumps(holder[key])[:60]}"


def _place(draw: random.Random, tree: Any) -> tuple[Any, Any, str] | None:
    """(holder, key, name) somewhere in `tree`; shallow places are as likely as the many deep ones."""
    holder, key, name = None, None, ""
    value = tree
    while isinstance(value, (dict, list)) and value and (holder is None or draw.random() < 0.7):
        holder = value
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        name += f".{key}"[:40]
        value = value[key]
    return None if holder is None else (holder, key, name)


def _header(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    header, what = _json(draw, raw[8 : 8 + size].decode())
    if draw.random() < 0.1:
        size = draw.choice(NUMBERS)
        return (size % 2**64).to_bytes(8, "little") + raw[8:], f"a header of {size} bytes"
    return len(header).to_bytes(8, "little") + header.encode() + raw[8 + size :], what


# ---- vocabularies and templates -----------------------------------------------------------------------------------


def _lines(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    lines = raw.splitlines()
    at = draw.randrange(len(lines))
    new = draw.choice(
        (
            b"",
            b" ",
            b"!!!! 0",
            b"IQ==",
            b"IQ== x",
            b"IQ== 1e9",
            b"IQ== -1",
            b"IQ== " + b"9" * 5000,
            b"= =",
            b"\xff\xfe 3",
        )
    )
    action = draw.choice(("line", "remove", "twice", "swap", "rank", "empty", "long"))
    if action == "line":
        lines[at] = new
    elif action == "remove":
        del lines[at]
    elif action == "twice":
        lines.insert(at, lines[at])
    elif action == "swap":
        lines[at], lines[0] = lines[0], lines[at]
    elif action == "rank":
        lines[at] = lines[at].split()[0] + b" %d" % draw.choice(NUMBERS)
    elif action == "empty":
        lines[at] = b" %d" % at
    else:
        lines.append(b"QUFB" * 3000 + b" %d" % len(lines))
    return b"\n".join(lines), f"line {at}: {action}"


def _template(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    if draw.random() < 0.7:
        source = draw.choice(HOSTILE)
        return source.encode(), repr(source[:80])
    return _bytes(draw, raw)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def _mutate_gguf(draw: random.Random, kind: str, original: Path, path: Path) -> str:
    if draw.random() < 0.3:
        raw, what = _bytes(draw, original.read_bytes())
        path.write_bytes(raw)
        return what
    gguf = gguf_byte_level() if kind == "gguf" else gguf_sentencepiece()
    what = ", ".join(_gguf(draw, gguf) for _ in range(draw.choice((1, 1, 1, 2, 3))))
    path.write_bytes(gguf.write())
    return what


def _gguf(draw: random.Random, gguf: Gguf) -> str:
    actions: list[Callable[[random.Random, Gguf], str]] = [_gguf_key] * 6 + [_gguf_entry] * 3 + [_gguf_counts]
    return draw.choice(actions)(draw, gguf)


def _gguf_counts(draw: random.Random, gguf: Gguf) -> str:
    field = draw.choice(("num_entries", "num_keys", "version"))
    number = draw.choice(NUMBERS)
    setattr(gguf, field, number % 2**32 if field == "version" else number)
    return f"{field} = {number}"


def _gguf_key(draw: random.Random, gguf: Gguf) -> str:
    if not gguf.keys:
        return "nothing"
    at = draw.randrange(len(gguf.keys))
    key, value = gguf.keys[at]
    action = draw.choice(
        ("value", "value", "item", "item", "remove", "twice", "rename", "count", "scalar", "array", "length")
    )
    scalars = [*SCALARS, TEXT]
    if action == "remove":
        del gguf.keys[at]
    elif action == "twice":
        gguf.keys.append((key, Value(draw.choice(scalars), draw.choice(NUMBERS))))
    elif action == "rename":
        new = draw.choice(
            ("", "x", "split.count", "tokenizer.chat_template.x", gguf.keys[0][0], key + "\0", _extra(draw, gguf))
        )
        gguf.keys[at] = (new, value)
    elif action == "count" and value.kind == ARRAY:
        value.count = draw.choice([*NUMBERS, len(value.value) - 1, len(value.value) + 1]) % 2**64
    elif action == "item" and value.kind == ARRAY and value.value:
        place = draw.randrange(len(value.value))
        if draw.random() < 0.5:
            value.item = draw.choice([*scalars, ARRAY, 13, 200])
        else:
            value.value[place] = draw.choice(["", " ", "\0", "<s>", "a" * 5000, "é", *NUMBERS, *FLOATS, float("nan")])
    elif action == "length" and value.kind == ARRAY:
        cut = draw.randrange(len(value.value) + 1)
        value.value = draw.choice((value.value[:cut], value.value + value.value[:cut], []))
    elif action == "array":
        item = draw.choice([*scalars, ARRAY, 13])
        values = draw.choice(([], [0], [1] * 300, ["a", "b"], [*NUMBERS], [float("nan")]))
        gguf.keys[at] = (key, Value(ARRAY, values, item))
    else:
        text = draw.choice(
            (HOSTILE if "template" in key else []) + ["", "x", "llama", "qwen2", "gpt2", "yarn", "\ud800"]
        )
        of = draw.choice(scalars)
        new_value = text if of == TEXT else draw.choice([*NUMBERS, *FLOATS, float("nan"), float("inf")])
        gguf.keys[at] = (key, Value(of, new_value))
    return f"{action} of key {key}: {gguf.keys[min(at, len(gguf.keys) - 1)]!r:.100}" if gguf.keys else "no key is left"


def _extra(draw: random.Random, gguf: Gguf) -> str:
    """A key that is read where it is there."""
    arch = str(gguf.keys[0][1].value)
    names = ("expert_count", "attention.key_length", "attention.sliding_window", "rope.scaling.factor")
    names += ("rope.scaling.type", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast")
    tokens = ("eot_token_id", "eom_token_id", "bos_token_id", "add_bos_token", "unknown_token_id", "pre")
    return draw.choice([*(f"{arch}.{name}" for name in names), *(f"tokenizer.ggml.{name}" for name in tokens)])


def _gguf_entry(draw: random.Random, gguf: Gguf) -> str:
    if not gguf.entries:
        return "nothing"
    entry = draw.choice(gguf.entries)
    action = draw.choice(("offset", "dims", "dim", "dtype", "name", "remove", "twice"))
    if action == "offset":
        other = draw.choice(gguf.entries).offset
        entry.offset = draw.choice([*NUMBERS, other, other + 1, entry.offset + 4, len(gguf.data)])
    elif action == "dims":
        entry.dims = draw.choice(
            ([], [0], [0, 0], [1, 2, 3, 4], [1] * 5, [2**32, 2**32], entry.dims[::-1], entry.dims * 2)
        )
    elif action == "dim":
        at = draw.randrange(len(entry.dims)) if entry.dims else 0
        entry.dims[at : at + 1] = [draw.choice([*NUMBERS, 32, 64, 256])]
    elif action == "dtype":
        entry.dtype = draw.choice([*range(40), 2**31])
    elif action == "name":
        entry.name = draw.choice(
            (
                "",
                "x",
                "blk.99.attn_q.weight",
                "blk.0.attn_q.bias",
                "blk.0.attn_q_norm.weight",
                "output.weight",
                "rope_freqs.weight",
                "\0",
                draw.choice(gguf.entries).name,
            )
        )
    elif action == "remove":
        gguf.entries.remove(entry)
    else:
        gguf.entries.append(copy.copy(entry))
    return f"{action} of tensor {entry.name!r}: {entry!r:.120}"
