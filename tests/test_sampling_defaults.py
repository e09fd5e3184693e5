"""What is used where a request says nothing: the same in Python, on the command line and over HTTP."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.checkpoint import hub, open_checkpoint, open_tokenizer_data
from octavo.cli.sampling import SamplingOptions
from octavo.config import EngineOptions, ServerOptions
from octavo.errors import ConfigError, RequestError
from octavo.sampling_defaults import advised, sampling_params
from octavo.sampling_params import RepetitionDetectionParams
from octavo.server.model import load_model
from octavo.server.protocol import CompletionRequest
from tests.served import save_tiny_model

SMALL: dict[str, Any] = {"device": "cpu", "kv_cache_memory": "1MiB", "max_num_seqs": 4}
ADVICE = {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2}
LOOPS = {"max_pattern_size": 8, "min_count": 3}


def model_with(folder: Path, generation_config: dict[str, Any]) -> str:
    path = save_tiny_model(folder)
    (path / "generation_config.json").write_text(json.dumps(generation_config))
    return str(path)


def test_what_the_makers_advise():
    assert advised({}) == {}
    assert advised({**ADVICE, "do_sample": True, "max_new_tokens": 9, "typical_p": 1, "eos_token_id": 3}) == ADVICE
    assert advised({"temperature": None, "top_k": 3}) == {"top_k": 3}
    assert advised({"temperature": 0.7, "do_sample": False}) == {"temperature": 0.0}


def test_a_request_comes_before_advice():
    advice = {**ADVICE, "repetition_detection": LOOPS}
    assert sampling_params(advice, {"top_k": 0, "max_tokens": 3}) == SamplingParams(
        **advice | {"top_k": 0, "max_tokens": 3}
    )
    assert sampling_params(advice, {"ignore_eos": True}) == SamplingParams(**ADVICE, ignore_eos=True)
    assert sampling_params(advice, {"beam_width": 3}) == SamplingParams(temperature=0, beam_width=3)
    with pytest.raises(RequestError, match="repetition_detection ends an answer, and ignore_eos wants all of it"):
        sampling_params(advice, {"ignore_eos": True, "repetition_detection": LOOPS})


@pytest.mark.parametrize(("option", "expected"), [("auto", ADVICE), ("none", {})])
def test_everybody_takes_the_same(tmp_path: Path, option: Any, expected: dict[str, Any]):
    model = model_with(tmp_path, ADVICE)
    llm = LLM(model, generation_config=option, **SMALL)
    try:
        assert llm.get_default_sampling_params() == SamplingParams(**expected)
        (text,) = llm._requests(["a"], None, None)
        assert text.request.params == SamplingParams(**expected)
        assert sampling_params(llm.sampling_defaults, SamplingOptions().given()) == SamplingParams(
            **expected, max_tokens=None
        )
    finally:
        llm.shutdown()
    served = load_model(EngineOptions(model, generation_config=option), ServerOptions())
    assert served.sampling_defaults == expected
    asked = CompletionRequest(prompt="a", temperature=0.9)
    assert asked.sampling(served.sampling_defaults) == SamplingParams(**expected | {"temperature": 0.9})


def test_another_tokenizer_brings_no_advice(tmp_path: Path):
    model, other = model_with(tmp_path / "a", {"top_k": 5}), model_with(tmp_path / "b", {"top_k": 6})
    llm = LLM(model, tokenizer=other, **SMALL)
    assert llm.sampling_defaults == {"top_k": 5}
    llm.shutdown()


def test_a_known_name_may_advise_more(smollm2_path: Path):
    name = "smollm2:135m"
    advice = dict(hub.MODELS[name].advice)
    assert advised(open_checkpoint(name).generation_config) == advice
    assert advised(open_tokenizer_data(name).generation_config) == advice
    assert load_model(EngineOptions(name), ServerOptions()).sampling_defaults == advice
    assert advised(open_checkpoint(str(smollm2_path)).generation_config) == {}
    assert SamplingParams(**advice).repetition_detection is not None


def test_runs_differ_and_seeds_repeat(tmp_path: Path):
    model = model_with(tmp_path, {})

    def answers(**options: Any) -> list[list[int]]:
        llm = LLM(model, **SMALL, **options)
        try:
            found = llm.generate(["a", "a"], SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
            return [output.outputs[0].token_ids for output in found]
        finally:
            llm.shutdown()

    first, second = answers(), answers()
    assert first != second
    assert first[0] != first[1]
    assert answers(seed=0) == answers(seed=0) != answers(seed=1)


def test_odd_choices_are_told():
    with pytest.raises(ConfigError, match="generation_config is 'vllm'; it must be auto or none"):
        EngineOptions("m", generation_config="vllm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "must be an object with max_pattern_size and min_count"),
        (7, "must be an object with max_pattern_size and min_count"),
        ({**LOOPS, "size": 3}, "must be an object with max_pattern_size and min_count"),
        ({**LOOPS, "max_pattern_size": 0}, "repetition_detection.max_pattern_size is 0"),
        ({**LOOPS, "max_pattern_size": 2.0}, "repetition_detection.max_pattern_size is 2.0"),
        ({**LOOPS, "min_count": 1}, "repetition_detection.min_count is 1"),
        ({**LOOPS, "min_pattern_size": 9}, "min_pattern_size is 9; it must be at most max_pattern_size"),
    ],
)
def test_odd_repetitions_are_told(given: Any, words: str):
    with pytest.raises(RequestError, match=words):
        SamplingParams(repetition_detection=given)


def test_repetitions_are_an_object_or_its_fields():
    whole = RepetitionDetectionParams(max_pattern_size=8, min_count=3)
    assert SamplingParams(repetition_detection=whole) == SamplingParams.from_dict({"repetition_detection": LOOPS})
