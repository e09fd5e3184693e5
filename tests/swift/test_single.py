"""One chat at a time: an engine in the place of transformers' model, answers with their history."""

import json
import shutil

import pytest

from octavo.errors import ConfigError
from octavo.swift import (
    ModelType,
    VllmGenerationConfig,
    get_default_template_type,
    get_model_tokenizer,
    get_template,
    inference,
    inference_stream,
    inference_vllm,
)

GREEDY = VllmGenerationConfig(max_tokens=8, temperature=0.0)


def test_a_script_of_ms_swift_s_kind(modelscope_cache, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(modelscope_cache))
    model_type = ModelType.qwen_7b_chat
    model, tokenizer = get_model_tokenizer(model_type, None, {"device_map": "auto"}, max_model_len=512)
    try:
        assert (model.generation_config.temperature, model.generation_config.max_tokens) == (1.0, 512)
        model.generation_config.max_new_tokens = 5
        template = get_template(get_default_template_type(model_type), tokenizer)
        response, history = inference(model, template, "你好")
        assert history == [["你好", response]]
        told = []
        for response, told in inference_stream(model, template, "And?", history):
            assert told[-1] == ["And?", response]
        assert told[:-1] == history
    finally:
        model.shutdown()


def test_it_answers_as_inference_vllm_does(engine, template, capsys):
    (expected,) = inference_vllm(engine, template, [{"query": "Who?"}], generation_config=GREEDY)
    info = {}
    answer = inference(engine, template, "Who?", generation_config=GREEDY, generation_info=info)
    assert answer == (expected["response"], expected["history"])
    assert info["num_samples"] == 1
    assert capsys.readouterr().out == ""
    printed = inference(engine, template, "Who?", generation_config=GREEDY, verbose=True, stream=True)
    assert printed == answer
    assert capsys.readouterr().out == f"[PROMPT]Who?[OUTPUT]{expected['response']}\n"
    first = expected["response"][:3]
    assert inference(engine, template, "Who?", generation_config=GREEDY, stop_words=[first])[0] == ""
    assert first not in engine.generation_config.stop


def test_a_tokenizer_alone(modelscope_cache):
    folder = str(modelscope_cache / "qwen/Qwen-7B-Chat")
    model, tokenizer = get_model_tokenizer("qwen-7b-chat", load_model=False, model_id_or_path=folder)
    assert model is None
    assert tokenizer.eos_token == "<|im_end|>"


def test_sampling_is_the_file_s_to_ask_for(modelscope_cache, tmp_path):
    folder = shutil.copytree(modelscope_cache / "qwen/Qwen-7B-Chat", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    model, _ = get_model_tokenizer("qwen-7b-chat", model_id_or_path=str(folder), max_model_len=64)
    assert (model.generation_config.temperature, model.generation_config.max_tokens) == (0, None)
    model.shutdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_kwargs": {"device_map": "cuda:1"}}, "only device_map='auto'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"max_model_length": 3}, "Did you mean 'max_model_len'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        get_model_tokenizer("qwen-7b-chat", **options)


def test_unknown_options_of_an_inference(engine, template):
    with pytest.raises(ConfigError, match="Did you mean 'verbose'"):
        inference(engine, template, "Who?", verbos=True)
    with pytest.raises(ValueError, match="images is given"):
        inference(engine, template, "Who?", images=["a.png"])
