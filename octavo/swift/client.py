"""Clients of a server that speaks OpenAI's HTTP interface: `InferClient`, and the functions of ms-swift 2.x.

Standard library only. A streamed answer is an iterator that reads from its own connection; closing it hangs up, which
ends the request on the server.
"""

import asyncio
import http.client
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import ConfigError, OctavoError, nearest
from octavo.progress import Progress
from octavo.swift.messages import history_to_messages
from octavo.swift.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
    CompletionResponse,
    CompletionResponseChoice,
    CompletionStreamResponse,
    DeltaMessage,
    InferRequest,
    InferStats,
    Model,
    ModelList,
    RequestConfig,
    UsageInfo,
)

Json = dict[str, Any]
MAX_WORKERS = 64  # requests under way at once


class ServerError(OctavoError):
    """A server that cannot be reached, or that refused a request; `status` is HTTP's, 0 if there was none."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class InferClient:
    """A client with the interface of `VllmEngine.infer`. Raises `ServerError`."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str = "EMPTY",
        *,
        base_url: str | None = None,
        timeout: float | None = 86400,
    ):
        self._route = _Route(base_url or f"http://{host}:{port}/v1", api_key, timeout)

    @property
    def models(self) -> list[str]:
        """Names of the models that the server has."""
        return [model.id for model in _model_list(self._route.get("/models")).data]

    def infer(
        self,
        infer_requests: Sequence[InferRequest | Mapping[str, Any]],
        request_config: RequestConfig | None = None,
        metrics: Sequence[InferStats] | None = None,
        *,
        model: str | None = None,
        use_tqdm: bool | None = None,
    ) -> list[Any]:
        """A response for each request, several under way at once; with `stream=True`, an iterator for each."""
        config = request_config or RequestConfig()
        name = model or self.models[0]
        bodies = [self._body(request, config, name) for request in infer_requests]
        if config.stream:
            return [self._stream(body, metrics or ()) for body in bodies]
        responses = []
        with (
            Progress(len(bodies), bool(use_tqdm)) as progress,
            ThreadPoolExecutor(min(MAX_WORKERS, max(1, len(bodies)))) as pool,
        ):
            for found in pool.map(lambda body: self._route.post("/chat/completions", body), bodies):
                response = _chat_response(found)
                for metric in metrics or ():
                    metric.update(response)
                responses.append(response)
                progress.requests += 1
                progress.tokens += response.usage.completion_tokens
                progress.show()
        return responses

    async def infer_async(
        self,
        infer_request: InferRequest | Mapping[str, Any],
        request_config: RequestConfig | None = None,
        *,
        model: str | None = None,
    ) -> Any:
        """The response to one request, or an async iterator over its pieces."""
        (answer,) = await asyncio.to_thread(self.infer, [infer_request], request_config, model=model)
        return _in_threads(answer) if isinstance(answer, Iterator) else answer

    def _body(self, request: InferRequest | Mapping[str, Any], config: RequestConfig, model: str) -> Json:
        asked = request if isinstance(request, InferRequest) else InferRequest(**request)
        body: Json = {"model": model, "messages": asked.messages, **config.body()}
        if asked.tools:
            body["tools"] = asked.tools
        if asked.chat_template_kwargs:
            body["chat_template_kwargs"] = asked.chat_template_kwargs
        return body

    def _stream(self, body: Json, metrics: Sequence[InferStats]) -> Iterator[ChatCompletionStreamResponse]:
        for found in self._route.stream("/chat/completions", body):
            piece = _chat_piece(found)
            for metric in metrics:
                metric.update(piece)
            if piece.choices:  # the last of an OpenAI server has counts alone
                yield piece


# ---- the functions of 2.x -------------------------------------------------------------------------------------


def get_model_list_client(
    host: str = "127.0.0.1", port: str | int = "8000", api_key: str = "EMPTY", *, url: str | None = None
) -> ModelList:
    """The models that a server has."""
    return _model_list(_Route(url or f"http://{host}:{port}/v1", api_key, _timeout()).get("/models"))


async def get_model_list_client_async(*args: Any, **kwargs: Any) -> ModelList:
    return await asyncio.to_thread(get_model_list_client, *args, **kwargs)


def inference_client(
    model_type: str,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    images: Sequence[str] | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = "auto",
    is_chat_request: bool = True,
    request_config: RequestConfig | None = None,
    host: str = "127.0.0.1",
    port: str | int = "8000",
    api_key: str = "EMPTY",
    url: str | None = None,
    **kwargs: Any,
) -> Any:
    """One answer of a server, or with `request_config.stream` an iterator over its pieces.

    `is_chat_request=False` asks the completions route: `query` is the prompt as it stands.
    """
    for name in kwargs:
        raise ConfigError(
            f"{name} is not an option of inference_client.{nearest(name, inference_client.__annotations__)}"
        )
    if images:
        raise ConfigError("images is given, but Octavo takes text only; leave it out")
    config = request_config or RequestConfig()
    route = _Route(url or f"http://{host}:{port}/v1", api_key, _timeout())
    body: Json = {"model": model_type, **config.body()}
    if not is_chat_request:
        body["prompt"] = query
        if config.stream:
            return (_completion_piece(found) for found in route.stream("/completions", body) if found["choices"])
        return _completion_response(route.post("/completions", body))
    body["messages"] = history_to_messages([*(history or ()), (query, None)], system)
    if tools:
        body |= {"tools": list(tools), "tool_choice": tool_choice}
    if config.stream:
        return (_chat_piece(found) for found in route.stream("/chat/completions", body) if found["choices"])
    return _chat_response(route.post("/chat/completions", body))


async def inference_client_async(*args: Any, **kwargs: Any) -> Any:
    """`inference_client` for an event loop: a response, or an async iterator."""
    answer = await asyncio.to_thread(inference_client, *args, **kwargs)
    return _in_threads(answer) if isinstance(answer, Iterator) else answer


async def _in_threads(pieces: Iterator[Any]) -> AsyncIterator[Any]:
    """A blocking iterator, each step in a thread."""
    end = object()
    while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
        yield piece


# ---- HTTP -----------------------------------------------------------------------------------------------------


def _timeout() -> float | None:
    seconds = float(os.environ.get("TIMEOUT", "1800"))
    return seconds if seconds > 0 else None


class _Route:
    """Requests below one address."""

    def __init__(self, url: str, api_key: str | None, timeout: float | None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url is {url!r}; it must be like http://127.0.0.1:8000/v1")
        self._url = url
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._place = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Json:
        return self._whole("GET", path, None)

    def post(self, path: str, body: Json) -> Json:
        return self._whole("POST", path, body)

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """The JSON of each event until the last; the connection closes with the iterator."""
        connection, response = self._send("POST", path, {**body, "stream_options": {"include_usage": True}})
        try:
            for line in response:
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    found = json.loads(data)
                    if "error" in found or found.get("object") == "error":
                        raise ServerError(_message(found))
                    yield found
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self._url} broke off in the middle of an answer: {error}") from None
        finally:
            connection.close()

    def _whole(self, method: str, path: str, body: Json | None) -> Json:
        connection, response = self._send(method, path, body)
        try:
            found: Json = json.loads(response.read())
            return found
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self._url} gave no whole answer: {error}") from None
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: Json | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._kind(self._place, timeout=self._timeout)
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        try:
            connection.request(method, self._path + path, content, self._headers)
            response = connection.getresponse()
            if response.status < 400:
                return connection, response
            raise ServerError(_refusal(response), response.status)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerError(
                f"no server answers at {self._url} ({error}); start one, or check host and port"
            ) from None
        except ServerError:
            connection.close()
            raise


def _refusal(response: http.client.HTTPResponse) -> str:
    content = response.read()
    try:
        return f"the server refused (HTTP {response.status}): {_message(json.loads(content))}"
    except (ValueError, AttributeError):
        return f"the server refused (HTTP {response.status}): {content[:200].decode('utf-8', 'replace')}"


def _message(found: Json) -> str:
    """The text of an error, in OpenAI's shape or in ms-swift's."""
    error = found.get("error")
    return str(error["message"] if isinstance(error, Mapping) else found.get("message", found))


# ---- from JSON ------------------------------------------------------------------------------------------------


def _usage(found: Json) -> UsageInfo | None:
    given = found.get("usage")
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return None if given is None else UsageInfo(*(given.get(name, 0) for name in names))


def _message_parts(found: Json) -> Json:
    names = ("role", "content", "tool_calls", "reasoning_content")
    return {name: found[name] for name in names if found.get(name) is not None}


def _chat_response(found: Json) -> ChatCompletionResponse:
    choices = [
        ChatCompletionResponseChoice(
            choice["index"],
            ChatMessage(**{"role": "assistant", "content": None, **_message_parts(choice["message"])}),
            choice["finish_reason"],
            choice.get("logprobs"),
        )
        for choice in found["choices"]
    ]
    usage = _usage(found) or UsageInfo()
    return ChatCompletionResponse(found["model"], choices, usage, found["id"], found["object"], found["created"])


def _chat_piece(found: Json) -> ChatCompletionStreamResponse:
    choices = [
        ChatCompletionResponseStreamChoice(
            choice["index"],
            DeltaMessage(**_message_parts(choice["delta"])),
            choice.get("finish_reason"),
            choice.get("logprobs"),
        )
        for choice in found["choices"]
    ]
    return ChatCompletionStreamResponse(
        found["model"], choices, _usage(found), found["id"], found["object"], found["created"]
    )


def _texts(found: Json) -> list[CompletionResponseChoice]:
    return [
        CompletionResponseChoice(choice["index"], choice["text"], choice.get("finish_reason"), choice.get("logprobs"))
        for choice in found["choices"]
    ]


def _completion_response(found: Json) -> CompletionResponse:
    usage = _usage(found) or UsageInfo()
    return CompletionResponse(found["model"], _texts(found), usage, found["id"], found["object"], found["created"])


def _completion_piece(found: Json) -> CompletionStreamResponse:
    return CompletionStreamResponse(
        found["model"], _texts(found), _usage(found), found["id"], found["object"], found["created"]
    )


def _model_list(found: Json) -> ModelList:
    known = ("id", "is_chat", "is_multimodal", "object", "created", "owned_by")
    return ModelList([Model(**{name: item[name] for name in known if name in item}) for item in found["data"]])
