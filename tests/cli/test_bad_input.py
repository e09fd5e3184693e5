"""Models that are damaged, incomplete or not for Octavo: one line that names the fault and the fix, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from octavo.cli import main
from tests.tiny_models import save_llama

VOCAB = 160


def save_tokenizer(folder: Path, size: int) -> None:
    words = {f"w{i}": i for i in range(size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with which nothing is wrong, in two shards."""
    folder = save_llama(tmp_path_factory.mktemp("models") / "whole")
    save_tokenizer(folder, VOCAB)
    split(folder)
    return folder


def split(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, group in halves.items():
        save_file({name: tensors[name] for name in group}, folder / file)
    weight_map = {name: file for file, group in halves.items() for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return change


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


SHARD = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another architecture": (config(architectures=["BertForMaskedLM"]), "'BertForMaskedLM' is not supported."),
    "nearly an architecture": (config(architectures=["LLamaForCausalLM"]), "Did you mean 'LlamaForCausalLM'?"),
    "no architecture": (config(architectures=None), "architectures is None"),
    "a field is missing": (config(num_hidden_layers=None), "num_hidden_layers is missing"),
    "a field of another kind": (config(vocab_size="many"), "vocab_size is 'many'"),
    "heads that do not divide": (config(num_key_value_heads=3), "num_key_value_heads is 3"),
    "width against heads": (config(hidden_size=66, head_dim=None), "hidden_size is 66"),
    "fewer layers than stored": (config(num_hidden_layers=1), "check num_hidden_layers"),
    "more layers than stored": (config(num_hidden_layers=3), "is missing"),
    "another width": (config(intermediate_size=100), "one of the two belongs to another model"),
    "config.json is no JSON": (write("config.json", "{"), "is not JSON"),
    "no config.json": (remove("config.json"), "has no config.json"),
    "a shard is missing": (remove(SHARD), f"lacks {SHARD} of its 2 shards"),
    "a shard is cut short": (cut(SHARD, 5000), "was cut short"),
    "a shard is cut in its header": (cut(SHARD, 100), "it was cut short"),
    "a shard is empty": (cut(SHARD, 0), "is empty"),
    "the index is missing": (remove("model.safetensors.index.json"), "fetch that file too"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json"),
    "a tokenizer cut short": (cut("tokenizer.json", 100), "tokenizer.json cannot be used"),
    "a tokenizer of another model": (lambda folder: save_tokenizer(folder, VOCAB + 1), "different models"),
}


def fails(capsys: pytest.CaptureFixture[str], model: Path, words: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"hello"\n')
    code = main(["generate", "-i", str(prompts), "-o", str(tmp_path / "out.jsonl"), str(model), "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if " octavo: " not in line]
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("octavo: error: ")
    assert words in lines[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder(damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    change, words = DAMAGES[damage]
    change(folder)
    fails(capsys, folder, words, tmp_path)


@pytest.mark.parametrize("keep", [3, 1000, 2_000_000, 60_000_000])
def test_a_gguf_file_cut_short(keep: int, smollm2_path: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2_path.open("rb") as whole, path.open("wb") as part:
        part.write(whole.read(keep))
    fails(capsys, path, "cut short" if keep > 3 else "is not a GGUF file", tmp_path)


def test_a_pickle(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    fails(capsys, folder, "convert its .bin or .pth files to safetensors", tmp_path)


def test_a_server_with_another_model_s_tokenizer(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    save_tokenizer(folder, VOCAB + 1)
    assert main(["serve", str(folder), "--device", "cpu", "--port", "0"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "different models" in err.splitlines()[-1]


def test_plan_refuses_the_same(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    config(architectures=["BertForMaskedLM"])(folder)
    assert main(["plan", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("octavo: error: architecture 'BertForMaskedLM' is not supported.")


def test_plan_and_serve_say_one_line_too(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    write("tokenizer_config.json", '{"added_tokens_decoder": [3]}')(folder)
    assert main(["serve", str(folder), "--device", "cpu", "--port", "0"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "has an added_tokens_decoder that is [3]" in err.splitlines()[-1]
    remove("tokenizer_config.json")(folder)
    config(architectures=[["LlamaForCausalLM"]])(folder)
    for command in (["plan"], ["serve", "--device", "cpu", "--port", "0"]):
        assert main([*command, str(folder)]) == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err
        assert "architectures is [['LlamaForCausalLM']]" in err.splitlines()[-1]


def test_no_memory_is_one_line(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo.cli import plan

    def full(options: Any, memory: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(plan, "make_plan", full)
    assert main(["plan", str(whole)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("octavo: error: this machine's memory is used up")


@pytest.mark.parametrize("name", ["~nobody-has-this-name/m", "a\nb", "x" * 5000, "x\0y", "\ud800", "/proc/x/y"])
def test_names_that_can_be_no_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("octavo: error: model ")


def test_what_the_system_refuses_is_one_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"w1"\n')
    folder = shutil.copytree(whole, tmp_path / "model")
    target = str(tmp_path / "missing" / "out.jsonl")
    command = ["generate", "-i", str(prompts), "-o", target, str(folder), "--device", "cpu", "--max-tokens", "2"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert f"output {target} cannot be made, since there is no folder" in err.splitlines()[-1]


def test_a_line_that_is_no_text_spares_the_others(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(b'"w1"\n"\xff"\n' + b"[" * 5000 + b'\n"w2"\n')
    folder = shutil.copytree(whole, tmp_path / "model")
    command = ["generate", "-i", str(prompts), "-o", str(answers), str(folder), "--device", "cpu", "--max-tokens", "2"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "line 2: the prompt must be Unicode text" in err
    assert "line 3: " in err
    assert "Traceback" not in err
    assert [json.loads(line)["line"] for line in answers.read_text().splitlines()] == [1, 4]
