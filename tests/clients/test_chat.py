"""What each client's first page shows: an answer, a stream, several turns, its own errors."""

import asyncio
from typing import Any

import pytest
from conftest import KEY, NAME

QUESTION = "What is the capital of France? Answer with one word."
MESSAGES = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def test_openai(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        assert [card.id for card in client.models.list()] == [NAME, "org/model"]
        assert client.models.retrieve("org/model").id == "org/model"
        whole = client.chat.completions.create(model=NAME, messages=MESSAGES, **GREEDY)
        assert "Paris" in whole.choices[0].message.content
        assert whole.usage.completion_tokens > 0
        assert whole._request_id
        chunks = list(
            client.chat.completions.create(
                model="org/model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        text = client.completions.create(model=NAME, prompt="1, 2, 3,", logprobs=2, **GREEDY)
        assert text.choices[0].text.startswith(" 4")
        assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="temperature is 3"):
            client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=3)
    with openai.OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_openai_async_and_many_at_once(url: str) -> None:
    import openai

    async def whole() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:

            async def ask(number: int) -> str:
                prompt = f"Count from {number} to {number + 3}."
                answer = await client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": prompt}], **GREEDY
                )
                return answer.choices[0].message.content

            return await asyncio.gather(*(ask(number) for number in range(16)))

    assert all(asyncio.run(whole()))


def test_langchain(url: str) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    model = ChatOpenAI(base_url=url, api_key=KEY, model=NAME, **GREEDY)
    first = model.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    assert "Paris" in first.content
    assert first.usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in model.stream([("user", QUESTION)]))
    more = [HumanMessage(QUESTION), AIMessage(first.content), HumanMessage("And of Italy?")]
    assert model.invoke(more).content
    assert len(model.batch([[("user", "Hi")], [("user", "Bye")]])) == 2
    assert OpenAI(base_url=url, api_key=KEY, model=NAME, **GREEDY).invoke("1, 2, 3,").startswith(" 4")


def test_llama_index(url: str) -> None:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model=NAME, api_base=url, api_key=KEY, is_chat_model=True, temperature=0, max_tokens=24)
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert "Paris" in model.chat(messages).message.content
    assert "".join(piece.delta or "" for piece in model.stream_chat(messages))
    base = OpenAILike(model=NAME, api_base=url, api_key=KEY, is_chat_model=False, temperature=0, max_tokens=8)
    assert "4" in base.complete("1, 2, 3,").text


def test_litellm(url: str) -> None:
    import litellm

    asked = {"model": f"hosted_vllm/{NAME}", "api_base": url, "api_key": KEY, "messages": MESSAGES, **GREEDY}
    assert "Paris" in litellm.completion(**asked).choices[0].message.content
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(stream=True, **asked)]
    assert "Paris" in "".join(pieces)
    asked["model"] = f"openai/{NAME}"
    assert "Paris" in litellm.completion(**asked).choices[0].message.content


def test_pydantic_ai(url: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(NAME, provider=OpenAIProvider(base_url=url, api_key=KEY))
    agent = Agent(
        model, instructions="You are a helpful assistant.", model_settings={"temperature": 0, "max_tokens": 24}
    )
    first = agent.run_sync(QUESTION)
    assert "Paris" in first.output
    assert agent.run_sync("And of Italy?", message_history=first.all_messages()).output


def test_huggingface_hub(url: str) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=url, api_key=KEY)
    answer = client.chat_completion(MESSAGES, model=NAME, **GREEDY)
    assert "Paris" in answer.choices[0].message.content
    chunks = client.chat_completion(MESSAGES, model=NAME, stream=True, **GREEDY)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
