"""A tiny random Qwen-7B-Chat in a ModelScope cache, an engine around it, and the default model's tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.swift import HfTokenizer, ModelType, get_template, get_vllm_engine
from octavo.swift.engine import SwiftEngine
from octavo.swift.template import Template
from octavo.text.tokenizer import Tokenizer
from tests.tiny_models import write_tiny_qwen_v1


@pytest.fixture(scope="session")
def modelscope_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for MODELSCOPE_CACHE, in its old layout."""
    root = tmp_path_factory.mktemp("modelscope")
    write_tiny_qwen_v1(root / "qwen" / "Qwen-7B-Chat")
    return root


@pytest.fixture(scope="session")
def engine(modelscope_cache: Path) -> Iterator[SwiftEngine]:
    """An engine of the tiny Qwen; a test that changes its generation_config passes a config of its own instead."""
    folder = modelscope_cache / "qwen" / "Qwen-7B-Chat"
    made = get_vllm_engine(
        ModelType.qwen_7b_chat, model_id_or_path=str(folder), engine_kwargs={"kv_cache_memory": "32MiB"}
    )
    yield made
    made.shutdown()


@pytest.fixture
def template(engine: SwiftEngine) -> Template:
    return get_template("qwen", engine.hf_tokenizer)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> HfTokenizer:
    return HfTokenizer(Tokenizer.load(str(smollm2_path)))
