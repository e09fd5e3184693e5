"""What /openapi.json says: requests from their own models, and here the shapes of what comes back.

The answers are written by hand where they are made; these models describe them, and tests hold each answer to them.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from octavo.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Fields,
    StreamOptions,
    TextPart,
    TokenizeRequest,
)

Json = dict[str, Any]
REQUESTS: tuple[type[Fields], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

_REF = "#/components/schemas/{model}"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class CachedTokens(_Shape):
    cached_tokens: int


class Usage(_Shape):
    """Tokens, over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(_Shape):
    logprob: float
    rank: int | None
    decoded_token: str | None


# One entry a prompt token: its log probabilities by token id, null for the first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]
Reason = Literal["stop", "length", "repetition"]


class _Choice(_Shape):
    """`stop_reason` is the stop text or token id that ended it; the scores are a beam's."""

    index: int
    finish_reason: Reason | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    beam_score: float | None = None


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class _Envelope(_Shape):
    """`created` is a Unix time in seconds."""

    id: str
    created: int
    model: str


class ChatCompletion(_Envelope):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None


class ChatDelta(_Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(_Envelope):
    """One event of a streamed chat. `usage` is there if it was asked for, in the last chunk or in each."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(_Shape):
    """Four lists with an entry for each token; `text_offset` counts characters of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: PromptLogprobs | None


class Completion(_Envelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class CompletionChunk(_Envelope):
    """One event of a streamed completion. `usage` is there if it was asked for, in the last chunk or in each."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class Tokens(_Shape):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(_Shape):
    prompt: str


class ModelCard(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Shape):
    """`reason` says why, where it is not well."""

    status: Literal["ok", "unhealthy", "ready", "not ready"]
    reason: str | None = None


class Version(_Shape):
    version: str


class ErrorDetails(_Shape):
    """`param` is the field at fault."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(_Shape):
    error: ErrorDetails


# What comes back with 200: as one object, and as the events of a stream.
ANSWERS: Mapping[str, tuple[type[BaseModel], type[BaseModel] | None]] = {
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
    "/v1/completions": (Completion, CompletionChunk),
    "/tokenize": (Tokens, None),
    "/detokenize": (Detokenized, None),
    "/v1/models": (ModelList, None),
    "/v1/models/{name}": (ModelCard, None),
    "/health": (Health, None),
    "/ping": (Health, None),
    "/ready": (Health, None),
    "/version": (Version, None),
}


class _WithoutNullDefaults(GenerateJsonSchema):
    """Null stands for what this server chooses, which no reader should take for the default."""

    def default_schema(self, schema: Any) -> Json:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def components() -> Json:
    """The schemas by name."""
    answers = [kind for pair in ANSWERS.values() for kind in pair if kind is not None]
    kinds = [(kind, "validation") for kind in dict.fromkeys([*REQUESTS, *answers, Error])]
    _, made = models_json_schema(kinds, ref_template=_REF, schema_generator=_WithoutNullDefaults)  # type: ignore[arg-type]
    schemas: Json = made["$defs"]
    parts: tuple[type[Fields], ...] = (StreamOptions, ChatMessage, TextPart)
    for request in REQUESTS + parts:
        schema = schemas[request.__name__]
        for name, values in request.fields_without_effect().items():
            schema["properties"][name] = _TAKEN if values is None else {"enum": list(values), "description": _AT_REST}
        schema["additionalProperties"] = False
    return schemas


_TAKEN = {"description": "Taken, and changes nothing."}
_AT_REST = "Taken at these values alone, which ask for nothing."


def operations(paths: Json, root: Mapping[str, type[BaseModel]]) -> Json:
    """FastAPI's `paths` with what goes in, from the model of each path in `root`, and what comes back."""
    for path, methods in paths.items():
        for operation in methods.values():
            if path in root:
                schema = {"$ref": _REF.format(model=root[path].__name__)}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
            operation["responses"] = _responses(path)
    return paths


def _responses(path: str) -> Json:
    if path not in ANSWERS:
        return {"200": {"description": "Prometheus' text format.", "content": {"text/plain": {}}}}
    whole, chunk = ANSWERS[path]
    content = {"application/json": {"schema": {"$ref": _REF.format(model=whole.__name__)}}}
    told = "The answer."
    if chunk is not None:
        content["text/event-stream"] = {"schema": {"$ref": _REF.format(model=chunk.__name__)}}
        told = "The answer; with `stream`, events `data: CHUNK`, then `data: [DONE]`."
    responses = {"200": {"description": told, "content": content}}
    if whole is Health:
        return responses | {"503": {"description": "It is not.", "content": content}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return responses | {"default": {"description": "What is wrong, and what to do.", "content": error}}
