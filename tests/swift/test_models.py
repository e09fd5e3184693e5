"""Model types, where their files are found, engines made of them, and generation configs."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.hubs import find
from octavo.checkpoint.repository import RepositoryName
from octavo.errors import ConfigError, DownloadError, RequestError
from octavo.swift import (
    MODEL_MAPPING,
    TEMPLATE_MAPPING,
    ModelType,
    TemplateType,
    VllmGenerationConfig,
    get_default_template_type,
    get_template,
    get_vllm_engine,
    inference_vllm,
    register_model,
)
from octavo.swift.engine import dtype_name, warn_of_idle_cards
from octavo.swift.models import guess_model_type, locate
from tests.checkpoint.fake_hubs import FakeHub, serving
from tests.tiny_models import write_tiny_qwen_v1


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of both hubs, below one folder."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "USE_HF"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


# ---- names ----------------------------------------------------------------------------------------------------


def test_names():
    assert ModelType.qwen_7b_chat == "qwen-7b-chat"
    assert ModelType.qwen2_5_0_5b_instruct == "qwen2_5-0_5b-instruct"
    assert TemplateType.default_generation == "default-generation"
    assert len(MODEL_MAPPING) > 430
    assert not hasattr(ModelType, "qwen_7b_cat")
    with pytest.raises(ConfigError, match="Did you mean 'qwen_7b_chat'"):
        _ = ModelType.qwen_7b_chta


def test_each_model_type_has_a_template():
    assert {info["template"] for info in MODEL_MAPPING.values()} <= set(TEMPLATE_MAPPING)
    assert get_default_template_type("qwen-7b-chat") == "qwen"
    assert get_default_template_type("qwen-7b") == "default-generation"
    with pytest.raises(ConfigError, match="Did you mean 'qwen-7b-chat'"):
        get_default_template_type("qwen-7b-chatt")


def test_importing_and_naming_load_no_torch():
    code = """
import sys
from octavo.swift import *
from octavo.swift import ModelType, TemplateType, get_vllm_engine
assert ModelType.qwen_7b_chat and TemplateType.qwen
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "hub", "place"),
    [
        ("qwen/Qwen-7B-Chat", "modelscope", "ms/qwen/Qwen-7B-Chat"),
        ("qwen/Qwen1.5-7B", "modelscope", "ms/qwen/Qwen1___5-7B"),
        ("qwen/Qwen1.5-7B", "modelscope", "ms/models/qwen/Qwen1___5-7B"),
        ("qwen/Qwen1.5-7B", "modelscope", "ms/hub/qwen/Qwen1___5-7B"),
        ("qwen/Qwen1.5-7B", "modelscope", "ms/hub/models/qwen/Qwen1.5-7B"),
        ("qwen/Qwen1.5-7B", "modelscope", "ms/models/qwen--Qwen1.5-7B/snapshots/master"),
        ("Qwen/Qwen-7B", "hf", "hf/hub/models--Qwen--Qwen-7B/snapshots/abc"),
    ],
)
def test_caches_of_the_hubs(caches, repository, hub, place):
    assert find(RepositoryName(repository), hub, None) is None
    folder = put_model(caches / place)
    assert find(RepositoryName(repository), hub, None) == folder
    assert locate(None, repository) == str(folder)


def test_the_revision_that_main_names_goes_first(caches):
    folder = caches / "hf/hub/models--a--b"
    for commit in ("new", "old"):
        put_model(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("old\n")
    assert find(RepositoryName("a/b"), "hf", None) == folder / "snapshots/old"
    assert find(RepositoryName("a/b"), "hf", "new") == folder / "snapshots/new"


def test_the_hub_that_is_asked_for_goes_first(caches, monkeypatch):
    modelscope = put_model(caches / "ms/qwen/Qwen-7B-Chat")
    hf = put_model(caches / "hf/hub/models--Qwen--Qwen-7B-Chat/snapshots/abc")
    assert locate("qwen-7b-chat", None) == str(modelscope)
    assert locate("qwen-7b-chat", None, use_hf=True) == str(hf)
    monkeypatch.setenv("USE_HF", "1")
    assert locate("qwen-7b-chat", None) == str(hf)


def test_a_model_that_is_nowhere_is_asked_of_the_hub(caches, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"qwen/Qwen-7B-Chat is not on this machine .*127\.0\.0\.1:9"):
        locate("qwen-7b-chat", None)
    with pytest.raises(DownloadError, match=r"there is no model at \./nowhere"):
        locate(None, "./nowhere")


def test_a_model_type_is_fetched_from_modelscope_and_answers(caches, monkeypatch):
    folder = write_tiny_qwen_v1(caches / "source")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serving(FakeHub("qwen/Qwen-7B-Chat", files)) as hub:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
        made = get_vllm_engine(ModelType.qwen_7b_chat, engine_kwargs={"kv_cache_memory": "32MiB"})
        asked = hub.asked.total()
        assert locate("qwen-7b-chat", None) == made.engine_args.model
        assert hub.asked.total() == asked, "what is here is not asked for again"
    try:
        assert Path(made.model_dir).is_relative_to(caches / "ms")
        assert (Path(made.model_dir) / "qwen.tiktoken").read_bytes() == files["qwen.tiktoken"]
        template = get_template(get_default_template_type("qwen-7b-chat"), made.hf_tokenizer)
        config = VllmGenerationConfig(max_tokens=4, temperature=0.0, ignore_eos=True, skip_special_tokens=True)
        (answer,) = inference_vllm(made, template, [{"query": "你好"}], generation_config=config)
        assert answer["history"] == [["你好", answer["response"]]]
    finally:
        made.shutdown()


def test_types_are_guessed_from_ids_and_folders(tmp_path):
    assert guess_model_type("Qwen/Qwen-7B-Chat") == "qwen-7b-chat"
    assert guess_model_type("/data/qwen/Qwen1___5-7B-Chat") == "qwen1half-7b-chat"
    assert guess_model_type("/data/mine") is None


def test_registering():
    register_model("test-model", "mine/Model", "qwen", exist_ok=True)
    assert ModelType.test_model == "test-model"
    with pytest.raises(ConfigError, match="registered already"):
        register_model("test-model", "mine/Model", "qwen")
    del MODEL_MAPPING["test-model"]


# ---- engines --------------------------------------------------------------------------------------------------


def test_what_an_engine_tells(engine, modelscope_cache):
    assert engine.model_type == "qwen-7b-chat"
    assert engine.model_dir == str(modelscope_cache / "qwen/Qwen-7B-Chat")
    assert engine.dtype is getattr(torch, engine.model_config.dtype)
    assert engine.max_model_len == engine.model_config.max_model_len == 8192
    assert engine.is_multimodal is False
    assert engine.engine_args.max_num_seqs == 256
    assert engine.hf_tokenizer.eos_token == "<|im_end|>"
    config = engine.generation_config
    assert (config.max_tokens, config.temperature, config.top_k, config.top_p) == (512, 1.0, -1, 0.8)
    assert config.repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"enable_lora": True}, "enable_lora is not supported yet"),
        ({"use_async": True}, "use_async=True"),
        ({"gpu_memory_utilisation": 0.5}, "Did you mean 'gpu_memory_utilization'"),
        ({"engine_kwargs": {"max_num_seq": 3}}, "Did you mean 'max_num_seqs'"),
        ({"engine_kwargs": {"swap_space": 4}}, "swap_space is 4, which are bytes"),
        ({"limit_mm_per_prompt": {"image": 2}}, "limit_mm_per_prompt"),
        ({"torch_dtype": "int4"}, "choose float16, bfloat16, float32"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, modelscope_cache):
    folder = str(modelscope_cache / "qwen/Qwen-7B-Chat")
    with pytest.raises(ConfigError, match=message):
        get_vllm_engine("qwen-7b-chat", model_id_or_path=folder, **options)


def test_dtypes():
    assert [dtype_name(kind) for kind in (None, torch.bfloat16, torch.float16, "float32")] == [
        *("auto", "bfloat16", "float16", "float32")
    ]
    with pytest.raises(KeyError, match="choose float16"):
        dtype_name(torch.int8)


def test_idle_cards_are_one_line(monkeypatch, caplog):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    warn_of_idle_cards("cuda", 1)
    assert not caplog.records
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    warn_of_idle_cards("cuda", 1)
    (line,) = caplog.messages
    assert "names 2 cards, but the model runs on 1" in line
    assert "tensor_parallel_size" in line


# ---- generation configs ---------------------------------------------------------------------------------------


def test_assignments():
    config = VllmGenerationConfig()
    assert (config.max_tokens, config.temperature, config.top_k, config.stop) == (64, 1.0, 50, [])
    assert config.skip_special_tokens is False
    config.max_new_tokens = 256
    assert config.max_tokens == config.max_new_tokens == 256
    config.temperature = 0.3
    config.do_sample = False
    assert config.temperature == 0
    config.do_sample = True
    assert config.temperature == 0.3
    for name, value in (("max_length", 9), ("temprature", 0.1)):
        with pytest.raises(ValueError, match=r"max_new_tokens|Did you mean 'temperature'"):
            setattr(config, name, value)
    assert copy.deepcopy(config) == config
    assert VllmGenerationConfig(7, 0.5, 0, 0.9, 1.2).top_k == -1
    assert VllmGenerationConfig(max_new_tokens=9).max_tokens == 9
    assert VllmGenerationConfig(do_sample=False).temperature == 0


def test_parameters_for_the_engine():
    config = VllmGenerationConfig()
    config.stop = "Paris"
    assert config.stop == ["Paris"]
    beams = VllmGenerationConfig(num_beams=4, n=2).sampling_params(["<|im_end|>"], [2])
    assert (beams.beam_width, beams.n, beams.temperature, beams.stop, beams.stop_token_ids) == (4, 2, 0.0, [], [2])
    with pytest.raises(ConfigError, match="set num_beams to the number of beams"):
        VllmGenerationConfig(use_beam_search=True).sampling_params([], [])
    params = VllmGenerationConfig(min_p=0.1, stop="a").sampling_params(["b"], [2])
    assert (params.min_p, params.stop, params.stop_token_ids, params.max_tokens) == (0.1, ["a", "b"], [2], 64)
    with pytest.raises(RequestError, match=r"length_penalty is for beam search, which is off"):
        VllmGenerationConfig(length_penalty=2.0).sampling_params([], [])


def test_a_file_s_do_sample_means_nothing():
    config = VllmGenerationConfig.from_model(json.loads('{"do_sample": false, "top_k": 0, "max_new_tokens": 9}'))
    assert (config.temperature, config.top_k, config.max_tokens) == (1.0, -1, 9)


def test_every_public_name_is_there_whatever_was_imported_before():
    code = """
import octavo.swift, pkgutil, importlib, types
for module in pkgutil.iter_modules(octavo.swift.__path__):
    importlib.import_module(f"octavo.swift.{module.name}")
for name in octavo.swift.__all__:
    assert not isinstance(getattr(octavo.swift, name), types.ModuleType), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
