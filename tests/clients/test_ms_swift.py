"""ms-swift 2.6.1 as a client of `octavo deploy`: two modules of its wheel, since the whole needs torch."""

import asyncio
import sys
import types
import zipfile
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
from conftest import KEY, NAME

WHEELS = Path(sys.prefix) / "wheels"


@pytest.fixture(scope="module")
def swift() -> ModuleType:
    """The client's module, with its siblings of the package replaced by what of them it uses."""

    def history_to_messages(history, query, system=None, roles=None):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in history or ():
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": query}]

    package = types.ModuleType("swift_client")
    package.__path__ = []
    sys.modules["swift_client"] = package
    for name, content in (
        ("template", {"History": list}),
        ("utils", {"Messages": list, "history_to_messages": history_to_messages}),
    ):
        module = sys.modules[f"swift_client.{name}"] = types.ModuleType(f"swift_client.{name}")
        vars(module).update(content)
    (wheel,) = WHEELS.glob("ms_swift-2.6.1-*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name in ("protocol", "client_utils"):
            module = sys.modules[f"swift_client.{name}"] = types.ModuleType(f"swift_client.{name}")
            module.__package__ = "swift_client"
            exec(compile(files.read(f"swift/llm/utils/{name}.py"), name, "exec"), vars(module))
    module.XRequestConfig = sys.modules["swift_client.protocol"].XRequestConfig
    return module


@pytest.fixture
def where(deployed: str) -> dict[str, str]:
    parts = urlsplit(deployed)
    return {"host": str(parts.hostname), "port": str(parts.port), "api_key": KEY}


def test_models(swift: ModuleType, where: dict[str, str]) -> None:
    (card,) = swift.get_model_list_client(**where).data
    assert (card.id, card.is_chat, card.is_multimodal) == (NAME, True, False)
    assert asyncio.run(swift.get_model_list_client_async(**where)).data == [card]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True, "top_logprobs": 3},
        {"num_beams": 3, "n": 2},
        {"n": 2, "temperature": 0.7, "seed": 1},
        {"stop": ["Paris"], "temperature": 0.0},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05, "presence_penalty": 0.1},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_answers(swift: ModuleType, where: dict[str, str], options: dict) -> None:
    config = swift.XRequestConfig(max_tokens=24, **options)
    asked = {"history": [("Hi", "Hello!")], "system": "You are a helpful assistant.", "is_multimodal": False}
    query = "What is the capital of France?"
    whole = swift.inference_client(NAME, query, request_config=config, **asked, **where)
    assert len(whole.choices) == config.n
    assert all(choice.message.role == "assistant" for choice in whole.choices)
    assert whole.usage.completion_tokens > 0
    if config.logprobs:
        assert len(whole.choices[0].logprobs["content"]) == whole.usage.completion_tokens
        assert len(whole.choices[0].logprobs["content"][0]["top_logprobs"]) == 3
    if config.stop:
        assert "Paris" not in whole.choices[0].message.content
    config.stream = True
    pieces = list(swift.inference_client(NAME, query, request_config=config, **asked, **where))
    assert pieces[-1].usage.completion_tokens > 0
    if config.temperature == 0 or config.num_beams > 1:
        text = "".join(choice.delta.content for piece in pieces for choice in piece.choices if choice.index == 0)
        assert text == whole.choices[0].message.content


def test_errors(swift: ModuleType, where: dict[str, str]) -> None:
    with pytest.raises(Exception, match="model_type: none"):
        swift.inference_client("none", "Hi", **where)
    config = swift.XRequestConfig(temperature=-1.0)
    with pytest.raises(Exception, match="temperature is -1"):
        swift.inference_client(NAME, "Hi", request_config=config, **where)
