"""Chat completions, whole and streamed: the same words."""

from pathlib import Path

from octavo.server.protocol import HARMLESS, HARMLESS_IN_MESSAGES, ChatMessage
from tests.server.serving import Server, events, run

TEXT = "Hi, wörld 🙂!"


def streamed_text(chunks: list[dict], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


@run
async def test_whole(server: Server):
    answer = await server.chat(model="tiny")
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert reply["usage"]["prompt_tokens"] == len("user:hello") + len("assistant:") + 3  # <s> </s> <s>
    assert reply["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@run
async def test_streamed(server: Server):
    answer = await server.chat(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert streamed_text(chunks) == TEXT
    assert "usage" not in chunks[0]


@run
async def test_many_samples_are_told_apart(server: Server):
    whole = (await server.chat(n=3, temperature=0.5, seed=1)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [TEXT, f"{TEXT} 1", f"{TEXT} 2"]
    chunks = events((await server.chat(n=3, stream=True)).text)
    for index, choice in enumerate(whole["choices"]):
        assert streamed_text(chunks, index) == choice["message"]["content"]
    assert sum(choice["delta"].get("role") == "assistant" for chunk in chunks for choice in chunk["choices"]) == 3


@run
async def test_usage_comes_last_when_asked_for(server: Server):
    chunks = events((await server.chat(stream=True, stream_options={"include_usage": True})).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == (await server.chat()).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@run
async def test_a_stop_string_cuts_the_text_and_ends_the_sequence_in_the_engine(server: Server):
    whole = (await server.chat(stop=["ld 🙂"], n=2)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Hi, wör"] * 2
    assert whole["choices"][0]["stop_reason"] == "ld 🙂"
    assert sorted(index for _, index in server.engine.aborted) == [0, 1]
    assert server.engine.stats.running == 0
    chunks = events((await server.chat(stop="ld 🙂", stream=True)).text)
    assert streamed_text(chunks) == "Hi, wör"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@run
async def test_max_tokens_by_either_name(server: Server):
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = (await server.chat(**{name: 2})).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hi", "length")


@run
async def test_without_a_limit_the_answer_may_fill_the_context(server: Server):
    seen = []
    script = server.engine.script
    server.engine.script = lambda request, index: seen.append(request) or script(request, index)
    await server.chat("x" * 100)
    await server.chat("x" * 100, n=4)
    prompt = len(seen[0].prompt_token_ids)
    assert seen[0].params.max_tokens == 512 - prompt
    # 64 blocks of 16: the prompt's 7 full ones are shared, the others are for four samples
    assert seen[1].params.max_tokens == (57 // 4 + 7) * 16 - prompt


@run
async def test_logprobs(server: Server):
    whole = (await server.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert len(whole) == len(TEXT.encode()) + 1
    assert whole[0]["token"] == "H"
    assert whole[0]["bytes"] == [ord("H")]
    assert whole[0]["logprob"] == -0.5
    assert [len(position["top_logprobs"]) for position in whole[:3]] == [2, 2, 2]
    assert whole[0]["top_logprobs"][0]["token"] == "H"
    chunks = events((await server.chat(logprobs=True, top_logprobs=2, stream=True)).text)
    told = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [position for logprobs in told if logprobs for position in logprobs["content"]] == whole
    bare = (await server.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []


@run
async def test_prompt_logprobs(server: Server):
    reply = (await server.chat(prompt_logprobs=1)).json()
    entries = reply["prompt_logprobs"]
    assert len(entries) == reply["usage"]["prompt_tokens"]
    assert entries[0] is None
    assert [next(iter(entry.values()))["decoded_token"] for entry in entries[1:6]] == list("user:")


@run
async def test_the_template_gets_what_was_asked(server: Server):
    async def prompt(**fields) -> str:
        tokens = (await server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}], **fields})).json()
        return (await server.post("/detokenize", {"tokens": tokens["tokens"]})).json()["prompt"]

    assert await prompt() == "<s>user:a</s><s>assistant:"
    assert await prompt(add_generation_prompt=False) == "<s>user:a</s>"
    assert await prompt(chat_template_kwargs={"mood": "glad"}) == "<s>user:a</s><s>assistant:glad"
    for name in ("self", "caller", "messages"):
        field = f"chat_template_kwargs.{name}"
        body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: 1}}
        for path in ("/tokenize", "/v1/chat/completions"):
            error = (await server.post(path, body)).json()["error"]
            assert error["param"] == field
            assert error["message"].startswith(f"{field} cannot be set")


@run
async def test_fields_that_change_no_answer(server: Server):
    """docs/api.md lists each; their values are nobody's business."""
    plain = (await server.chat()).json()["choices"]
    api = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in (*HARMLESS, *HARMLESS_IN_MESSAGES):
        assert f"`{name}`" in api
    for fields in (
        *({name: value} for name in HARMLESS for value in (None, True, "low", {"a": [1]})),
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"vllm_xargs": None},
        {"n": 1.0, "max_tokens": 40.0, "seed": 7.0, "top_k": 0.0},
        {"stream_options": None},
    ):
        assert (await server.chat(**fields)).json()["choices"] == plain
    marked = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]
    for message in ({"content": marked}, {"content": "hello", "cache_control": {"type": "ephemeral"}}):
        answer = await server.post("/v1/chat/completions", {"messages": [{"role": "user", **message}]})
        assert answer.json()["choices"] == plain


@run
async def test_history_as_clients_send_it_back(server: Server):
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": []},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "reasoning": None},
        {"role": "user", "content": "c"},
    ]
    tokens = (await server.post("/tokenize", {"messages": history})).json()["tokens"]
    prompt = (await server.post("/detokenize", {"tokens": tokens})).json()["prompt"]
    assert prompt == "<s>user:a</s><s>assistant:</s><s>assistant:b</s><s>user:c</s><s>assistant:"


def test_templates_are_given_what_was_thought_before():
    for name in ("reasoning", "reasoning_content"):
        message = ChatMessage.model_validate({"role": "assistant", "content": "b", name: "hm"})
        assert message.plain("messages.0") == {"role": "assistant", "content": "b", "reasoning_content": "hm"}


@run
async def test_usage_in_each_chunk(server: Server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events((await server.chat(stream=True, stream_options=options)).text)
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert told == sorted(told)
    assert len(set(told)) > 5
    assert chunks[-1]["usage"] == last["usage"]


@run
async def test_messages_as_clients_send_them(server: Server):
    """Text parts, the newer word for system, and an answer of ours sent back as it came."""
    ours = (await server.chat()).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": parts},
        ours | {"tool_calls": None},
    ]
    assert (await server.post("/v1/chat/completions", {"messages": messages})).status_code == 200
    tokens = (await server.post("/tokenize", {"messages": messages})).json()["tokens"]
    text = (await server.post("/detokenize", {"tokens": tokens})).json()["prompt"]
    assert text == f"<s>system:short</s><s>user:ab</s><s>assistant:{TEXT}</s><s>assistant:"


@run
async def test_fields_that_ask_for_nothing_are_fine(server: Server):
    answer = await server.chat(
        tools=None, tool_choice="none", response_format={"type": "text"}, store=False, user="me", metadata={}
    )
    assert answer.status_code == 200, answer.text
