"""Qwen v1 against a reference of its own: in steps by hand, and through the engine with all that it may do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.errors import CheckpointError, ConfigError, RequestError
from octavo.llm import LLM
from octavo.models import read_config, read_model
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.models.qwen_v1_reference import QwenV1
from tests.steps import Row, Steps, all_logits
from tests.tiny_models import QWEN_V1, FolderCheckpoint, runner_for, train_ranks, write_tiny_qwen_v1
from tests.tolerances import assert_logits_equal

TRAINED = 32
LENGTHS = {16: 1.0, 32: 1.0, 33: 3.0, 64: 3.0, 65: 7.0, 128: 7.0, 129: 15.0}
NUM_TOKENS = len(train_ranks()) + 208


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    return write_tiny_qwen_v1(folder, seq_length=TRAINED, max_position_embeddings=256)


@pytest.fixture(scope="session")
def reference(path: Path) -> QwenV1:
    return QwenV1(path)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, NUM_TOKENS, length).tolist()


def row(tokens: list[int], path: Path) -> Row:
    return Row(tokens, read_config(FolderCheckpoint(path).config).rope.ntk_alpha(len(tokens)))


def test_the_rotary_base_grows_in_steps(path: Path, reference: QwenV1) -> None:
    rope = read_config(FolderCheckpoint(path).config).rope
    assert {length: rope.ntk_alpha(length) for length in LENGTHS} == LENGTHS
    assert all(rope.ntk_alpha(length) == reference.alpha(length) for length in range(1, 300))


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal(path: Path, reference: QwenV1, length: int) -> None:
    tokens = prompt(length)
    expected = reference.logits(tokens, length)[:, :NUM_TOKENS]
    assert expected.std() > 0.5, "the model must say something"
    runner = runner_for(FolderCheckpoint(path))
    assert_logits_equal(all_logits(runner, row(tokens, path))[:, :NUM_TOKENS], expected, runner.model.config)


@pytest.mark.parametrize("without", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_rule_may_be_off(tmp_path: Path, without: str) -> None:
    write_tiny_qwen_v1(tmp_path, seq_length=TRAINED, max_position_embeddings=256, **{without: False})
    tokens = prompt(70)
    runner = runner_for(FolderCheckpoint(tmp_path))
    found = all_logits(runner, row(tokens, tmp_path))
    assert_logits_equal(found, QwenV1(tmp_path).logits(tokens, 70), runner.model.config)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_greedy_tokens_equal_in_a_mixed_batch(path: Path, reference: QwenV1, chunk: int) -> None:
    prompts = [prompt(length, seed=length) for length in (16, 30, 33, 65)]
    answers = Steps(runner_for(FolderCheckpoint(path))).generate([row(p, path) for p in prompts], 8, chunk)
    assert answers == [reference.greedy(p, 8) for p in prompts]


def engine(path: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {"kv_cache_memory": "4MiB", "device": "cpu", "dtype": "float32", "block_size": 4}
    return Engine.build(EngineOptions(model=str(path), **{**settings, **options}))


def answer(engine: Engine, prompts: list[list[int]], count: int = 8) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for i, tokens in enumerate(prompts):
        answers[str(i)] = []
        engine.add(Request(str(i), tokens, params))
    while engine.has_work():
        for request_id, _, token, *_ in engine.step().tokens:
            answers[request_id].append(token)
    return list(answers.values())


def greedy(reference: QwenV1, tokens: list[int], count: int = 8) -> list[int]:
    """The reference's answer among what stands for a token."""
    found = list(tokens)
    for _ in range(count):
        found.append(int(reference.logits(found, len(tokens))[-1, :NUM_TOKENS].argmax()))
    return found[len(tokens) :]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}, {"enable_prefix_caching": False}, {"block_size": 1}],
    ids=["default", "chunks", "no prefix cache", "blocks of one"],
)
def test_the_engine_agrees(path: Path, reference: QwenV1, options: dict[str, Any]) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 16, 30, 33, 65, 130)]
    assert answer(engine(path, **options), prompts) == [greedy(reference, p) for p in prompts]


def test_preempted_sequences_keep_their_base(path: Path, reference: QwenV1) -> None:
    prompts = [prompt(length, seed=length) for length in (30, 33, 62, 65)]
    block = read_config(FolderCheckpoint(path).config).kv_bytes_per_token("float32") * 4
    small = engine(path, max_model_len=110, kv_cache_memory=58 * block)
    small.scheduler._fits_ahead = lambda *_: True  # type: ignore[method-assign]
    assert answer(small, prompts, 40) == [greedy(reference, p, 40) for p in prompts]
    assert small.stats().preemptions > 0


def test_a_turn_that_crosses_a_boundary_takes_no_block_of_another_base(path: Path, reference: QwenV1) -> None:
    """A talk whose prompts have 20, 40 and 70 tokens: each begins as the one before, none may use its blocks."""
    caching = engine(path)
    for length in (20, 40, 70):
        talk = prompt(200)[:length]
        assert answer(caching, [talk]) == [greedy(reference, talk)]
        assert caching.stats().prefix_hit_tokens == 0
    talk = prompt(200)[:80]  # the same base as at 70
    assert answer(caching, [talk]) == [greedy(reference, talk)]
    assert caching.stats().prefix_hit_tokens > 60


def test_rows_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    """Here their logits are the largest: the head's rows above the last token are those of a certain winner."""
    write_tiny_qwen_v1(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = read_model(checkpoint)
    assert (model.num_tokens, model.vocab_size) == (NUM_TOKENS, 576)
    tiny = engine(tmp_path)
    head_VD = tiny.executor.runner.model.lm_head.weight_OI  # type: ignore[attr-defined]
    head_VD[NUM_TOKENS:] *= 50
    tokens = np.array(answer(tiny, [prompt(n, seed=n) for n in range(1, 20)], 20))
    assert tokens.max() < NUM_TOKENS
    with pytest.raises(RequestError, match=f"prompt holds token id {NUM_TOKENS}, outside the vocabulary"):
        tiny.add(Request("0", [NUM_TOKENS], SamplingParams()))
    sampled = SamplingParams(temperature=5.0, max_tokens=200, ignore_eos=True, logprobs=3, seed=1)
    tiny.add(Request("1", prompt(5), sampled))
    drawn = [token for _ in range(200) for token in tiny.step().tokens]
    assert max(token for _, _, token, *_ in drawn) < NUM_TOKENS
    assert max(max(logprobs[0]) for *_, logprobs in drawn if logprobs) < NUM_TOKENS


def test_what_ends_an_answer(tmp_path: Path) -> None:
    end = len(train_ranks())
    chat = read_model(open_checkpoint(str(write_tiny_qwen_v1(tmp_path / "chat"))))
    base = read_model(open_checkpoint(str(write_tiny_qwen_v1(tmp_path / "base", chat=False))))
    assert chat.eos_token_ids == (end + 2, end + 1, end)
    assert base.eos_token_ids == (end,)


def test_old_and_new_names_of_fields() -> None:
    new = {**QWEN_V1, "vocab_size": 576}
    renamed = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
    }
    assert read_config({renamed.get(name, name): value for name, value in new.items()}) == read_config(new)
    config = read_config(new)
    assert (config.intermediate_size, config.head_dim, config.num_kv_heads) == (128, 16, 4)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


def test_longest_context() -> None:
    def longest(**changes: Any) -> int:
        return read_config({**QWEN_V1, "vocab_size": 576, **changes}).max_position

    assert longest(seq_length=2048, max_position_embeddings=8192) == 8192
    assert longest(seq_length=8192, max_position_embeddings=2048) == 8192
    assert longest(seq_length=2048, max_position_embeddings=8192, use_dynamic_ntk=False) == 2048


def test_dtype_of_the_weights() -> None:
    def dtype(**changes: Any) -> str:
        return read_config({**QWEN_V1, "vocab_size": 576, **changes}).dtype

    assert dtype() == dtype(bf16=True) == "bfloat16"
    assert dtype(fp16=True) == dtype(torch_dtype="float16") == "float16"


def test_files_of_two_models(tmp_path: Path) -> None:
    write_tiny_qwen_v1(tmp_path, vocab_size=512)
    with pytest.raises(CheckpointError, match=f"{NUM_TOKENS} ids, but config.json gives vocab_size 512"):
        read_model(open_checkpoint(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        read_config({name: value for name, value in config.items() if name != "hidden_size"})


def test_a_chat_from_words_to_words(path: Path, reference: QwenV1) -> None:
    """Through `LLM`: the template of ChatML, the turn's end by <|im_end|>, text of tokens of ranks."""
    end = len(train_ranks())
    llm = LLM(str(path), kv_cache_memory="4MiB", device="cpu", dtype="float32")
    messages = [{"role": "user", "content": "浙江的省会在哪里？<|im_end|>"}]
    prompt_ids = llm.encode_chat(messages)
    assert [token for token in prompt_ids if token >= end] == [end + 1, end + 2] * 2 + [end + 1]
    free = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    said = greedy(reference, prompt_ids, 12)
    (whole,) = llm.chat(messages, free, use_tqdm=False)
    assert whole.outputs[0].token_ids == said
    assert whole.outputs[0].text == llm.tokenizer.decode(said)
    for stop in (end, end + 1, end + 2):
        forced = SamplingParams(temperature=0.0, max_tokens=12, logit_bias={stop: 100.0})
        (cut,) = llm.chat(messages, forced, use_tqdm=False)
        assert (cut.outputs[0].token_ids, cut.outputs[0].finish_reason, cut.outputs[0].text) == ([stop], "stop", "")
