"""`scripts/fingerprint`: lines that differ are told, and a model of it answers."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "fingerprint.py"
spec = importlib.util.spec_from_file_location("fingerprint", PATH)
assert spec is not None
assert spec.loader is not None
fingerprint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fingerprint)

LINES = """# generic
llama / float32 / greedy: tokens aa logprobs bb mean -5.0000000 some -1.000000 -40.000000
llama / float32 / plain: tokens cc
qwen / float16 / - refused: ConfigError
"""


@pytest.mark.parametrize(
    ("before", "after", "within", "differ"),
    [
        ("", "", 0.0, False),
        ("bb mean", "dd mean", 0.0, True),
        ("bb mean -5.0000000 some -1.000000", "dd mean -5.0000010 some -1.000001", 2e-6, False),
        ("-40.000000", "-40.000040", 2e-6, False),
        ("-40.000000", "-40.000120", 2e-6, True),
        ("bb mean -5.0000000", "dd mean -5.0000200", 2e-6, True),
        ("tokens aa logprobs bb", "tokens dd logprobs ee", 2e-6, True),
        ("tokens cc", "tokens dd", 2e-6, True),
        ("llama / float32 / plain: tokens cc\n", "", 2e-6, True),
    ],
)
def test_compare(tmp_path: Path, before: str, after: str, within: float, differ: bool):
    (tmp_path / "before").write_text(LINES)
    (tmp_path / "after").write_text(LINES.replace(before, after) if before else LINES)
    assert fingerprint.compare(tmp_path / "before", tmp_path / "after", within) == differ


def test_a_model_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    fingerprint.write_models(tmp_path)
    monkeypatch.setattr(fingerprint, "requests", lambda: {"greedy": [{"temperature": 0.0, "logprobs": 5}]})
    for name in ("float32", "preempted, swap"):
        options = fingerprint.engines("cpu")[name]
        fingerprint._fingerprint(tmp_path / "mistral", "mistral", name, options)
    once, again, *_ = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert once == again
    assert once.startswith("tokens ")
    assert " logprobs " in once
