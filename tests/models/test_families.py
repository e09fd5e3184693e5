"""Every family against `transformers` on the same weights: logits in fp32, greedy tokens, chunks, batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from octavo.config import EngineOptions
from octavo.runner.build import build_executor
from octavo.runner.cpu import KernelRunner
from tests.builds import choose, each_build
from tests.steps import Row, Steps, all_logits
from tests.tiny_models import FolderCheckpoint, runner_for, save_model
from tests.tolerances import assert_logits_equal

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "head_dim": 16,
        "intermediate_size": 100,
        "vocab_size": 77,
    },
    "wide heads": {"head_dim": 24},
    "one head each": {"num_key_value_heads": 4, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 40,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, factor given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
UNUSED_WINDOW = {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}
# name -> (family, what sets this configuration apart)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("Llama", changes) for name, changes in SHAPES.items()},
    **{name: ("Llama", {"rope_parameters": {"rope_theta": 10000.0, **rope}}) for name, rope in ROPES.items()},
    "mistral, window": ("Mistral", {"sliding_window": 13, "head_dim": 16}),
    "qwen2": ("Qwen2", UNUSED_WINDOW),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2, window in the upper layer": ("Qwen2", WINDOW),
    "qwen2, window by list": ("Qwen2", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": {"rope_theta": 1e6, **ROPES["yarn"]}}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, window": ("Qwen3", {"head_dim": 16, **WINDOW}),
}
CASES["dynamic"][1]["max_position_embeddings"] = 40
PLAIN = ("plain", "qwen2", "qwen3")
# They have a width that is no multiple of 16.
NOT_ON_KERNELS = ("odd", "wide heads", "qwen3")

Models = Callable[[str], tuple[Path, transformers.PreTrainedModel]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[str, tuple[Path, transformers.PreTrainedModel]] = {}

    def model(name: str) -> tuple[Path, transformers.PreTrainedModel]:
        if name not in made:
            family, changes = CASES[name]
            path = save_model(tmp_path_factory.mktemp(family), family, **changes)
            made[name] = path, transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        return made[name]

    return model


def prompt(length: int, seed: int, vocab_size: int = 77) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, length).tolist()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 37, 100])
def test_logits_equal(models: Models, name: str, length: int) -> None:
    path, reference = models(name)
    runner = runner_for(FolderCheckpoint(path))
    tokens = prompt(length, seed=length)
    row = Row(tokens, ntk_alpha=runner.model.config.rope.ntk_alpha(length))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.5, "the model must say something"
    assert_logits_equal(all_logits(runner, row), expected, runner.model.config)


@each_build
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ON_KERNELS])
@pytest.mark.parametrize("length", [1, 37, 79])
def test_logits_equal_on_the_kernels(
    models: Models, name: str, length: int, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = models(name)
    choose(monkeypatch, build)
    options = EngineOptions(model=str(path), dtype="float32", kv_cache_memory="4MiB", device="cpu")
    runner = build_executor(options)[0].runner  # type: ignore[attr-defined]
    assert isinstance(runner, KernelRunner)
    tokens = prompt(length, seed=length)
    batch = Steps(runner).batch([(Row(tokens, runner.model.config.rope.ntk_alpha(length)), length)])
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    found = torch.as_tensor(runner.forward.logits(runner.forward.hidden(batch)))
    assert_logits_equal(found, expected, runner.model.config)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dynamic"])
def test_greedy_tokens_equal_in_a_mixed_batch(models: Models, name: str) -> None:
    path, reference = models(name)
    prompts = [prompt(length, seed=length) for length in (1, 5, 23, 60)]
    answers = Steps(runner_for(FolderCheckpoint(path))).generate([Row(p) for p in prompts], 12, chunk=10)
    for tokens, answer in zip(prompts, answers, strict=True):
        assert answer == greedy(reference, tokens, answer)


def greedy(model: transformers.PreTrainedModel, tokens: list[int], answer: list[int]) -> list[int]:
    """What the reference says after each beginning of `tokens + answer`: the answer, if that is greedy."""
    with torch.inference_mode():
        said = model(torch.tensor([tokens + answer])).logits[0].argmax(-1).tolist()
    return said[len(tokens) - 1 : -1]


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 32])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", PLAIN)
def test_any_blocks_and_chunks_give_the_same_tokens(models: Models, name: str, block_size: int, chunk: int) -> None:
    path, _ = models(name)
    prompts = [prompt(length, seed=length) for length in (2, 31, 33, 70)]
    whole = Steps(runner_for(FolderCheckpoint(path))).generate([Row(p) for p in prompts], 8)
    runner = runner_for(FolderCheckpoint(path), block_size)
    assert Steps(runner, seed=1).generate([Row(p) for p in prompts], 8, chunk) == whole


def test_dynamic_rope_differs_by_row(models: Models) -> None:
    path, reference = models("dynamic")
    runner = runner_for(FolderCheckpoint(path))
    rows = [Row(prompt(n, seed=n), runner.model.config.rope.ntk_alpha(n)) for n in (20, 90)]
    assert rows[0].ntk_alpha == 1.0 < rows[1].ntk_alpha
    together = Steps(runner).generate(rows, 1, chunk=9)
    with torch.inference_mode():
        alone = [int(reference(torch.tensor([r.token_ids[:-1]])).logits[0, -1].argmax()) for r in rows]
    assert [answer[0] for answer in together] == alone
