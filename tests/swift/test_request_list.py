"""The functions of ms-swift 2.x: shapes of results, what is counted, how a stream behaves."""

import copy
import itertools
import re

import pytest

from octavo.errors import ConfigError, RequestError
from octavo.swift import (
    LoRARequest,
    VllmGenerationConfig,
    add_vllm_request,
    get_template,
    inference_stream_vllm,
    inference_vllm,
)

KEYS = ["num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s"]
REQUESTS = [{"query": "Who are you?"}, {"query": "你好"}, {"query": "Where is Beijing?", "system": "Brief."}]


def greedy(max_tokens: int = 12, **more) -> VllmGenerationConfig:
    return VllmGenerationConfig(max_tokens=max_tokens, temperature=0, **more)


def test_a_batch(engine, template):
    info = {"stale": 1}
    before = copy.deepcopy(REQUESTS)
    found = inference_vllm(engine, template, REQUESTS, generation_config=greedy(), generation_info=info)
    assert before == REQUESTS
    assert list(info) == KEYS
    assert info["num_samples"] == 3
    assert info["num_prompt_tokens"] == sum(len(template.encode(r)[0]["input_ids"]) for r in REQUESTS)
    assert info["samples/s"] == pytest.approx(3 / info["runtime"])
    assert info["tokens/s"] == pytest.approx(info["num_generated_tokens"] / info["runtime"])
    for request, response in zip(REQUESTS, found, strict=True):
        assert list(response) == ["response", "history"]
        assert response["history"] == [[request["query"], response["response"]]]
        (alone,) = inference_vllm(engine, template, [request], generation_config=greedy())
        assert alone == response


def test_parts_of_a_list_count_together(engine, template):
    whole, parts = {}, {}
    one = inference_vllm(engine, template, REQUESTS, generation_config=greedy(), generation_info=whole)
    two = inference_vllm(
        engine, template, REQUESTS, generation_config=greedy(), generation_info=parts, max_batch_size=2
    )
    assert one == two
    assert [whole[key] for key in KEYS[:3]] == [parts[key] for key in KEYS[:3]]


def test_nothing_to_do(engine, template):
    assert inference_vllm(engine, template, []) == []
    assert list(inference_stream_vllm(engine, template, [])) == []


def test_history_goes_on(engine, template):
    given = [("Hello", "Hi")]
    (first,) = inference_vllm(engine, template, [{"query": "A", "history": given}], generation_config=greedy(4))
    assert first["history"] == [("Hello", "Hi"), ["A", first["response"]]]
    request = {"query": "B", "history": first["history"]}
    (second,) = inference_vllm(engine, template, [request], generation_config=greedy(4))
    assert second["history"] == [*first["history"], ["B", second["response"]]]
    assert len(first["history"]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_observation_continues_the_last_answer(engine, template, stream):
    history = [["Q", "Action: look\nObservation:"]]
    request = {"query": " a cat", "history": history}
    run = inference_stream_vllm if stream else inference_vllm
    found = list(run(engine, template, [request], generation_config=greedy(6)))
    response = found[-1][0] if stream else found[0]
    assert response["history"] == [["Q", "Action: look\nObservation: a cat" + response["response"]]]
    assert history == [["Q", "Action: look\nObservation:"]]
    prompt = template.encode({"history": [["Q", "Action: look\nObservation: a cat"]], "query": None})[0]["input_ids"]
    assert template.tokenizer.decode(prompt).endswith("Observation: a cat")


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_prompts_are_answered_with_nothing(engine, stream):
    template = get_template("qwen", engine.hf_tokenizer, max_length=40)
    requests = [{"query": "Hi"}, {"query": "long " * 60, "history": [["a", "b"]]}]
    info = {}
    run = inference_stream_vllm if stream else inference_vllm
    found = list(run(engine, template, requests, generation_config=greedy(4), generation_info=info))
    responses = found[-1] if stream else found
    assert responses[1] == {"response": "", "history": [["a", "b"]]}
    assert info["num_samples"] == 1
    cut = inference_vllm(engine, template, requests, generation_config=greedy(4), truncation_strategy="truncation_left")
    assert cut[1]["history"][-1][0] == "long " * 60
    assert template.truncation_strategy == "delete"


# ---- streams --------------------------------------------------------------------------------------------------


def test_a_stream_of_one_reports_at_every_step(engine, template):
    info = {}
    request = {"query": "Who are you?", "history": [["Hello", "Hi"]]}
    last, count, seen = "", 0, []
    for responses in inference_stream_vllm(
        engine, template, [request], generation_config=greedy(20), generation_info=info
    ):
        seen.append(responses)
        response = responses[0]
        assert response["response"].startswith(last)
        assert response["history"] == [["Hello", "Hi"], ["Who are you?", response["response"]]]
        assert list(info) == KEYS
        assert info["num_generated_tokens"] == count + 1
        last, count = response["response"], count + 1
    assert all(responses is seen[0] for responses in seen)
    (whole,) = inference_vllm(engine, template, [request], generation_config=greedy(20))
    assert last == whole["response"]
    assert info["samples/s"] == pytest.approx(1 / info["runtime"])


def test_a_stream_of_many_flushes_now_and_then(engine, template):
    requests = [{"query": f"Number {i}"} for i in range(4)]
    whole = inference_vllm(engine, template, requests, generation_config=greedy(10))
    stream = inference_stream_vllm(engine, template, requests, generation_config=greedy(10), flush_steps=3)
    texts = [[response and response["response"] for response in responses] for responses in stream]
    assert texts[-1] == [response["response"] for response in whole]
    # 10 steps, all at once: after 3, 6, 9 and at the end.
    assert len(texts) == 4
    for earlier, later in itertools.pairwise(texts):
        assert all(new.startswith(old or "") for old, new in zip(earlier, later, strict=True))


def test_unfinished_text_ends_with_whole_words(engine, template):
    stream = inference_stream_vllm(engine, template, [{"query": "Hi"}], generation_config=greedy(40))
    texts = [responses[0]["response"] for responses in stream]
    for text in texts[:-1]:
        assert re.search(r"(^|[\s㐀-鿿])$", text), f"{text!r} ends in the middle of a word"


def test_a_slot_is_none_until_its_request_reports(engine, template):
    # The first request ends at its first token; the second has not been told by then.
    config = greedy(6)
    first = inference_vllm(engine, template, [{"query": "Hi"}], generation_config=greedy(1, logprobs=0))
    token = next(iter(first[0]["logprobs"][0]))
    config.stop_token_ids = [token]
    stream = inference_stream_vllm(
        engine, template, [{"query": "Hi"}, {"query": "Tell me more"}], generation_config=config, flush_steps=100
    )
    responses = next(stream)
    assert responses[0]["response"] == ""
    assert responses[1] is None
    stream.close()
    assert not engine.has_unfinished_requests()


def test_nothing_runs_before_the_first_next(engine, template):
    stream = inference_stream_vllm(engine, template, [{"query": 3}], nonsense=True)
    with pytest.raises(ConfigError, match="nonsense is not an option"):
        next(stream)


def test_leaving_a_stream_ends_its_requests(engine, template):
    stream = inference_stream_vllm(engine, template, REQUESTS, generation_config=greedy(200))
    next(stream)
    stream.close()
    assert not engine.has_unfinished_requests()
    assert engine.llm.engine.stats().running == 0


# ---- what a config changes ------------------------------------------------------------------------------------


def test_samples_and_logprobs(engine, template):
    info = {}
    config = VllmGenerationConfig(max_tokens=5, n=3, logprobs=1, seed=1)
    (response,) = inference_vllm(engine, template, [{"query": "Hi"}], generation_config=config, generation_info=info)
    assert 5 < info["num_generated_tokens"] <= 15
    assert info["num_samples"] == 1
    assert all(entry.logprob <= 0 for position in response["logprobs"] for entry in position.values())


def test_stop_strings(engine, template):
    (whole,) = inference_vllm(engine, template, [{"query": "Hi"}], generation_config=greedy(20))
    stop = whole["response"][6:8]
    (cut,) = inference_vllm(engine, template, [{"query": "Hi"}], generation_config=greedy(20, stop=[stop]))
    assert cut["response"] == whole["response"][: whole["response"].index(stop)]


def test_the_engine_s_config_is_the_default(engine, template, monkeypatch):
    monkeypatch.setattr(engine, "generation_config", greedy(3))
    info = {}
    inference_vllm(engine, template, [{"query": "Hi"}], generation_info=info)
    assert info["num_generated_tokens"] <= 3
    with pytest.raises(AssertionError, match="VllmGenerationConfig"):
        inference_vllm(engine, template, [{"query": "Hi"}], generation_config={"max_tokens": 3})


def test_an_answer_ends_where_the_context_does(engine, template):
    info = {}
    prompt = {"query": "ab " * ((engine.max_model_len - 60) // 3)}
    length = len(template.encode(prompt)[0]["input_ids"])
    assert length < engine.max_model_len
    inference_vllm(engine, template, [prompt], generation_config=greedy(10**6, ignore_eos=True), generation_info=info)
    assert info["num_generated_tokens"] <= engine.max_model_len - length
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_leaves_the_others_alone(engine, template, stream, caplog):
    info = {}
    requests = [{"query": "Hi"}, {"query": "ab " * engine.max_model_len, "history": [["a", "b"]]}, {"query": "Bye"}]
    run = inference_stream_vllm if stream else inference_vllm
    found = list(run(engine, template, requests, generation_config=greedy(4), generation_info=info))
    first, long, last = found[-1] if stream else found
    assert long == {"response": "", "history": [["a", "b"]]}
    assert first["response"]
    assert last["history"] == [["Bye", last["response"]]]
    assert info["num_samples"] == 2
    assert "request 1 of the list is not answered: its prompt has" in caplog.messages[0]
    assert not engine.has_unfinished_requests()


def test_verbose_prints_prompts_and_answers(engine, template, capsys):
    inference_vllm(engine, template, [{"query": "Hi"}], generation_config=greedy(3), verbose=True)
    shown = capsys.readouterr().out
    assert shown.startswith("[PROMPT]<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert "<|im_start|>assistant\n[OUTPUT]" in shown
    with pytest.raises(AssertionError, match="choose one"):
        inference_vllm(engine, template, [{"query": "Hi"}], verbose=True, use_tqdm=True)


def test_a_request_of_one_s_own(engine, template):
    inputs, _ = template.encode({"query": "Hi"})
    add_vllm_request(engine, inputs, request_id="mine", generation_config=greedy(5, ignore_eos=True))
    with pytest.raises(RequestError, match="'mine' is in use"):
        add_vllm_request(engine, inputs, request_id="mine", generation_config=greedy(5))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].request_id == "mine"
    assert outputs[-1].finished
    assert len(outputs[-1].outputs[0].token_ids) == 5


def test_adapters_are_refused(engine, template):
    with pytest.raises(ConfigError, match="lora_request is not supported yet"):
        inference_vllm(engine, template, [{"query": "Hi"}], lora_request=LoRARequest("a", 1, "/a"))
