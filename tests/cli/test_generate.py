"""`octavo generate` on lines as people write them: what is wrong with one is told by its number, the rest goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from tests.served import save_tiny_model

GOOD = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
# Lines as JSON values, or as they stand in the file.
BAD: list[Any] = [
    *(b"{", b"nonsense", b"[" * 10_000, b'{"prompt": "a"', b'{"prompt": "\xe9"}', b'"\\ud800"', b"NaN"),
    *(5, None, True, [], ["a"], {}, {"id": 1}, {**GOOD, **CHAT}),
    *({"prompt": value} for value in (None, 5, 1.5, True, "", [], ["a"], [None], [[5]], [-1], [10**9], [2**70], {})),
    *({"prompt": value} for value in ({"prompt": 5}, {"text": "a"}, {"prompt_token_ids": "a"}, "x" * 1000)),
    *({"messages": value} for value in (None, 5, "a", {}, [], [5], [None], [{}], [{"role": "user", "content": 5}])),
    *({"messages": [{"role": role, "content": "a"}]} for role in (None, 5)),
    *(
        {**GOOD, name: value}
        for name in ("stop", "bad_words", "stop_token_ids")
        for value in (5, 1.5, True, {"a": 1}, [None])
    ),
    *({**GOOD, "allowed_token_ids": value} for value in (5, "a", ["a"], [10**9], {})),
    *({**GOOD, "logit_bias": value} for value in (5, "a", [1], {"a": 1}, {"5": "x"}, {"5": None}, {"99999": 1})),
    *({**GOOD, "max_tokens": value} for value in (0, -1, "5", 1.5, True, 10**9, 2**70)),
    *({**GOOD, "n": value} for value in (0, None, "1", 129, 2**70)),
    *({**GOOD, "temperature": value} for value in (None, "hot", -1, 1e300, True)),
    *({**GOOD, "seed": value} for value in ("a", 1.5, 2**70)),
    *({**GOOD, "ignore_eos": value} for value in (None, 1, "yes")),
    *({**GOOD, "repetition_detection": value} for value in (5, {}, {"max_pattern_size": "a", "min_count": 2})),
    *({**GOOD, name: 1} for name in ("temprature", "best_of", "prompts", "__class__")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def generate(model: str, source: Path, target: Path) -> int:
    options = ["--device", "cpu", "--kv-cache-memory", "1MiB", "--max-num-seqs", "8"]
    return main(["generate", model, "-i", str(source), "-o", str(target), *options])


def test_bad_lines_are_told_by_their_numbers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [GOOD, *BAD, CHAT]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    assert generate(model, source, target) == 1
    said = capsys.readouterr().err
    told = {int(line.split()[1].rstrip(":")) for line in said.splitlines() if line.startswith("line ")}
    assert [lines[number - 1] for number in sorted(set(range(2, len(lines))) - told)] == []
    assert told == set(range(2, len(lines)))
    assert "Traceback" not in said
    assert f"2 answered, 0 already there, {len(BAD)} bad lines" in said
    assert [json.loads(line)["line"] for line in target.read_text().splitlines()] == [1, len(lines)]


def test_a_byte_order_mark_is_no_part_of_a_line(model: str, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD), encoding="utf-8-sig")
    assert generate(model, source, target) == 0
    assert [json.loads(line)["line"] for line in target.read_text().splitlines()] == [1, 3]
