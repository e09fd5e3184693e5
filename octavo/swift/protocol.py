"""The objects that the engines and clients of ms-swift take and give: requests, their settings, responses.

Shapes are OpenAI's with ms-swift's additions. Plain data; nothing is computed here but ids and times.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from octavo.errors import ConfigError
from octavo.sampling_params import SamplingParams

Messages = list[dict[str, Any]]


@dataclass(slots=True)
class InferRequest:
    """One chat. `chat_template_kwargs` go to the model's own template, where that is the one in use."""

    messages: Messages
    images: list[Any] = field(default_factory=list)
    audios: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    objects: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("images", "audios", "videos", "objects"):
            if getattr(self, name):
                raise ConfigError(f"{name} is given, but Octavo takes text only; leave it out")


# Settings that Octavo has nothing for, with the values at which they do nothing.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (None,),
    "structured_outputs_regex": (None,),
}
# Settings that the model's generation_config.json gives where a request does not.
FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(slots=True)
class RequestConfig:
    """How one request is answered. None takes the model's own value; `max_tokens` None is the rest of the context."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    stop: list[str] | str | None = None
    seed: int | None = None
    stream: bool = False
    logprobs: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    length_penalty: float = 1.0
    return_details: bool = False
    structured_outputs_regex: str | None = None

    def check(self) -> None:
        """Raises `ConfigError` for what Octavo cannot do."""
        for name, harmless in _NO_EFFECT.items():
            if getattr(self, name) not in harmless:
                value = getattr(self, name)
                raise ConfigError(f"{name} is {value!r}, which is not supported yet; leave it at {harmless[0]!r}")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ConfigError(f"length_penalty is {self.length_penalty!r}, which needs num_beams above 1; leave it out")

    def sampling_params(self, model: Mapping[str, Any], room: int, stops: list[str], ids: list[int]) -> SamplingParams:
        """Octavo's parameters: from here, else from the model's generation_config; `room` bounds the answer."""
        self.check()
        values = {name: model[name] for name in FROM_MODEL if model.get(name) is not None}
        if not model.get("do_sample", True):
            values["temperature"] = 0.0
        values |= {name: value for name in FROM_MODEL if (value := getattr(self, name)) is not None}
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if self.num_beams > 1:
            # A search draws nothing and knows no stop strings: the template's end of a turn is a token as well.
            chosen = {name: value for name in FROM_MODEL if (value := getattr(self, name)) is not None}
            values, stops = {"temperature": 0.0, **chosen}, []
            values |= {"beam_width": self.num_beams, "length_penalty": self.length_penalty}
        return SamplingParams(
            **values,
            n=self.n,
            max_tokens=max(1, room if self.max_tokens is None else min(self.max_tokens, room)),
            stop=list(dict.fromkeys([*given, *stops])),
            stop_token_ids=ids,
            seed=self.seed,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            skip_special_tokens=False,
        )

    def body(self) -> dict[str, Any]:
        """The settings as fields of an HTTP request; those at their defaults are left to the server."""
        self.check()
        blank = asdict(RequestConfig())
        changed = {name: value for name, value in asdict(self).items() if value != blank[name]}
        if changed.pop("return_details", False):
            raise ConfigError("return_details is not in the HTTP interface; leave it False")
        return changed


@dataclass(slots=True)
class UsageInfo:
    """Counts of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


@dataclass(slots=True)
class ChatMessage:
    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None


@dataclass(slots=True)
class DeltaMessage:
    """What a message grew by."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None


@dataclass(slots=True)
class ChatCompletionResponseChoice:
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: dict[str, list[dict[str, Any]]] | None = None
    token_ids: list[int] | None = None


@dataclass(slots=True)
class ChatCompletionResponseStreamChoice:
    index: int
    delta: DeltaMessage
    finish_reason: str | None
    logprobs: dict[str, list[dict[str, Any]]] | None = None


def _chat_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _now() -> int:
    return int(time.time())


@dataclass(slots=True)
class ChatCompletionResponse:
    """A whole answer. `prompt_token_ids` and a choice's `token_ids` are there if `return_details` was asked for."""

    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo
    id: str = field(default_factory=_chat_id)
    object: str = "chat.completion"
    created: int = field(default_factory=_now)
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None


@dataclass(slots=True)
class ChatCompletionStreamResponse:
    """A piece of an answer; `usage` counts from the answer's beginning."""

    model: str
    choices: list[ChatCompletionResponseStreamChoice]
    usage: UsageInfo | None = None
    id: str = field(default_factory=_chat_id)
    object: str = "chat.completion.chunk"
    created: int = field(default_factory=_now)


@dataclass(slots=True)
class CompletionResponseChoice:
    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


@dataclass(slots=True)
class CompletionResponse:
    """A whole answer of the completions route."""

    model: str
    choices: list[CompletionResponseChoice]
    usage: UsageInfo
    id: str = ""
    object: str = "text_completion"
    created: int = field(default_factory=_now)


@dataclass(slots=True)
class CompletionStreamResponse:
    """A piece of an answer of the completions route."""

    model: str
    choices: list[CompletionResponseChoice]
    usage: UsageInfo | None = None
    id: str = ""
    object: str = "text_completion"
    created: int = field(default_factory=_now)


@dataclass(slots=True)
class Model:
    """A model that a server has."""

    id: str
    is_chat: bool = True
    is_multimodal: bool = False
    object: str = "model"
    created: int = field(default_factory=_now)
    owned_by: str = "octavo"


@dataclass(slots=True)
class ModelList:
    data: list[Model]
    object: str = "list"


class InferStats:
    """Counts answers: `compute` gives num_prompt_tokens, num_generated_tokens, num_samples, runtime (seconds),
    samples/s and tokens/s since it was made or reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._began = time.perf_counter()
        self._usages: dict[str, UsageInfo] = {}

    def update(self, response: ChatCompletionResponse | ChatCompletionStreamResponse) -> None:
        """Counts a response; pieces of a streamed one count once."""
        if response.usage is not None:
            self._usages[response.id] = response.usage

    def compute(self) -> dict[str, float]:
        runtime = time.perf_counter() - self._began
        samples = len(self._usages)
        generated = sum(usage.completion_tokens for usage in self._usages.values())
        return {
            "num_prompt_tokens": sum(usage.prompt_tokens for usage in self._usages.values()),
            "num_generated_tokens": generated,
            "num_samples": samples,
            "runtime": runtime,
            "samples/s": samples / runtime,
            "tokens/s": generated / runtime,
        }
