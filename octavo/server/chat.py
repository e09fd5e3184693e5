"""Chat completions: messages to a prompt, and an answer in OpenAI's chat shapes, chunk by chunk or whole."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from octavo.errors import RequestError
from octavo.request import CompletionOutput, Logprob, Request
from octavo.server.access import NOBODY, Caller
from octavo.server.answer import Answer
from octavo.server.logprobs import check_prompt_logprobs, finite, most_likely, prompt_logprobs_json
from octavo.server.model import ServedModel, TextDelta
from octavo.server.protocol import ChatRequest
from octavo.server.service import Service
from octavo.server.stream import Json, ending_json, usage_json


async def start_chat(service: Service, asked: ChatRequest, caller: Caller = NOBODY) -> "ChatReply":
    """Submits a chat of `caller`; raises `RequestError`, `QueueFullError` or a `RefusedError`."""
    model = service.model_named(asked.model)
    service.dialect.adapt(asked)
    asked.check()
    service.dialect.check_chat(model)
    token_ids = await model.encode_chat(
        asked.messages, asked.add_generation_prompt, asked.chat_template_kwargs or {}, service.limits.max_model_len
    )
    limit = service.dialect.chat_tokens(asked.limit, service.limits.room(len(token_ids), asked.num_sequences))
    params = asked.sampling(model.sampling_defaults, max_tokens=limit, logprobs=asked.num_logprobs)
    check_prompt_logprobs(params.prompt_logprobs, len(token_ids), 1)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    bad_words = await model.bad_words(params.bad_words)
    salt = service.cache_salt(asked.cache_salt, caller)
    request = Request(answer_id, token_ids, params, asked.priority, salt, bad_words, tenant=caller.tenant)
    try:
        answer = await service.answer([request], [None], whole=not asked.stream)
    except RequestError as error:
        error.param = {"prompt": "messages"}.get(error.param or "", error.param)
        raise
    return ChatReply(answer, answer_id, model, asked)


class ChatReply:
    """`answer` in the shapes of chat.completion and chat.completion.chunk."""

    def __init__(self, answer: Answer, answer_id: str, model: ServedModel, asked: ChatRequest):
        self.answer = answer
        self.include_usage = asked.include_usage
        self.continuous_usage = asked.continuous_usage
        self.answer_id = answer_id
        self._model = model
        self._created = int(time.time())
        self._num_logprobs = asked.num_logprobs
        self._begun: set[int] = set()

    def envelope(self, kind: str = "chat.completion.chunk") -> Json:
        return {"id": self.answer_id, "object": kind, "created": self._created, "model": self._model.name}

    def choices(self, deltas: list[TextDelta]) -> Iterator[Json]:
        for delta in deltas:
            if delta.index not in self._begun:
                self._begun.add(delta.index)
                yield _chunk_choice(delta.index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            if delta.text or logprobs:
                yield _chunk_choice(delta.index, {"content": delta.text}, logprobs)
            if delta.finish_reason is not None:
                yield _chunk_choice(delta.index, {}) | ending_json(delta)

    def whole(self) -> Json:
        (result,) = self.answer.results()
        reply = self.envelope("chat.completion") | {
            "choices": [self._choice(output) for output in result.outputs],
            "usage": usage_json(self.answer),
        }
        logprobs = result.prompt_logprobs
        return reply | {"prompt_logprobs": None if logprobs is None else prompt_logprobs_json(logprobs)}

    def _choice(self, output: CompletionOutput) -> Json:
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
            **ending_json(output),
        }

    def _logprobs(self, token_ids: list[int], entries: list[dict[int, Logprob]] | None) -> Json | None:
        if entries is None or self._num_logprobs is None:
            return None
        return {"content": [self._position(*x) for x in zip(token_ids, entries, strict=True)], "refusal": None}

    def _position(self, token_id: int, entry: dict[int, Logprob]) -> Json:
        top = [self._token(other, entry[other]) for other in most_likely(entry, self._num_logprobs or 0)]
        return self._token(token_id, entry[token_id]) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: Logprob) -> Json:
        return {
            "token": logprob.decoded_token or "",
            "logprob": finite(logprob.logprob),
            "bytes": list(self._model.tokenizer.token_bytes(token_id)),
        }


def _chunk_choice(index: int, delta: dict[str, Any], logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
