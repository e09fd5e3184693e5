"""`octavo parity`: its table, its verdict, and what it says where there is nothing to compare with."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from octavo import parity
from octavo.cli import main
from tests.tiny_models import save_model, write_tiny_qwen_v1


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 564 tokens."""
    return write_tiny_qwen_v1(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "Qwen3", vocab_size=576, head_dim=16)


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["parity", *map(str, words), "--device", "cpu", "--max-tokens", "6"])
    out, err = capfd.readouterr()
    return code, out, err


def test_equal(model: Path, words: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, model, "--tokenizer", words)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("prompt ")
    assert [line.split()[0] for line in lines[1:-1]] == ["English", "Chinese", "code", "emoji", "one", "long"]
    assert lines[-1].startswith("equal: logits within ")
    assert lines[1].endswith("all 6")
    assert lines[6].split()[1] == "122", "cut to the context of 128"
    assert lines[-1].endswith("6 of 6 answers have the same greedy tokens")


def test_a_difference_is_shown_and_counts(
    model: Path, words: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Where is Beijing?\n\n你好\n")
    arguments = (model, "--tokenizer", words, "--prompts", prompts)
    code, out, _ = run(capfd, *arguments, "--tolerance", 1e-12)
    assert (code, out.splitlines()[1][:20]) == (1, "1: Where is Beijing?")
    assert "DIFFERENT: logits within" in out
    load = parity.load_reference

    def another(*given: Any) -> Any:
        reference = load(*given)
        reference.lm_head.weight.data = reference.lm_head.weight.data.roll(1, 0)
        return reference

    monkeypatch.setattr(parity, "load_reference", another)
    code, out, _ = run(capfd, *arguments)
    assert code == 1
    assert "0 of 6, then " in out
    assert "0 of 2 answers have the same greedy tokens" in out


def test_nothing_to_compare_with(
    words: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capfd, words)
    assert (code, out) == (2, "")
    assert "architecture QWenLMHeadModel is not in transformers" in err

    def missing(name: str) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(parity, "import_module", missing)
    code, _, err = run(capfd, words)
    assert code == 2
    assert err == (
        "octavo: error: parity compares with the package transformers, which is not installed;"
        " run: pip install transformers\n"
    )


def test_bad_prompts(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, message in (("missing", "cannot be read as text"), ("empty", "holds no prompt; write one a line")):
        code, _, err = run(capfd, model, "--prompts", tmp_path / name)
        assert code == 2
        assert message in err
