"""Chat completions, whole and streamed: the same words."""

import json

from serving import Server, run

TEXT = "Hi, wörld 🙂!"


def events(body: str) -> list[dict]:
    """The chunks of a stream that ended well."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


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
