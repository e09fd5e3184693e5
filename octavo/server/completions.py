"""Completions: prompts as text or token ids, and an answer in the shapes of OpenAI's older endpoint.

Several prompts are several requests to the engine; choice p * n + i is sample i of prompt p.
"""

import time
import uuid
from collections.abc import Iterator, Sequence

from octavo.request import Logprob, Request
from octavo.sampling_params import SamplingParams
from octavo.server.access import NOBODY, Caller
from octavo.server.answer import Answer, Part
from octavo.server.logprobs import check_prompt_logprobs, finite, most_likely, prompt_logprobs_json
from octavo.server.model import ServedModel, TextDelta
from octavo.server.protocol import CompletionRequest
from octavo.server.service import Service
from octavo.server.stream import Json, ending_json, usage_json


async def start_completion(service: Service, asked: CompletionRequest, caller: Caller = NOBODY) -> "CompletionReply":
    """Submits the prompts of `caller`; raises `RequestError`, `QueueFullError` or a `RefusedError`."""
    model = service.model_named(asked.model)
    service.dialect.adapt(asked)
    asked.check()
    service.dialect.check_completion(model)
    prompts = asked.prompts()
    encoded = await model.encode_prompts(prompts, asked.add_special_tokens, service.limits.max_model_len)
    room = service.limits.room(max(map(len, encoded), default=0), asked.num_sequences)
    limit = 1 if asked.prompt_only else service.dialect.completion_tokens(asked.max_tokens, room)
    params = asked.sampling(model.sampling_defaults, max_tokens=limit, logprobs=asked.logprobs)
    if asked.echo and asked.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = asked.logprobs
    check_prompt_logprobs(params.prompt_logprobs, sum(map(len, encoded)), params.n)
    bad_words = await model.bad_words(params.bad_words)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    salt = service.cache_salt(asked.cache_salt, caller)
    requests = [
        Request(f"{answer_id}-{place}", token_ids, params, asked.priority, salt, bad_words, tenant=caller.tenant)
        for place, token_ids in enumerate(encoded)
    ]
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    answer = await service.answer(requests, texts, whole=not asked.stream)
    answer.prompt_only = asked.prompt_only
    return CompletionReply(answer, answer_id, model, asked, params)


# The end of an answer of no tokens.
_NOTHING_ASKED: Json = {"finish_reason": "length", "stop_reason": None}


class CompletionReply:
    """`answer` in the shape of text_completion."""

    def __init__(
        self, answer: Answer, answer_id: str, model: ServedModel, asked: CompletionRequest, params: SamplingParams
    ):
        self.answer = answer
        self.include_usage = asked.include_usage
        self.continuous_usage = asked.continuous_usage
        self.answer_id = answer_id
        self._model = model
        self._created = int(time.time())
        self._echo = asked.echo
        self._show_prompt_logprobs = asked.prompt_logprobs is not None
        self._num_logprobs = asked.logprobs
        self._params = params
        self._offsets: dict[int, int] = {}  # characters of each choice whose logprobs were told

    def envelope(self) -> Json:
        return {"id": self.answer_id, "object": "text_completion", "created": self._created, "model": self._model.name}

    def choices(self, deltas: list[TextDelta]) -> Iterator[Json]:
        for delta in deltas:
            if delta.index not in self._offsets:
                self._offsets[delta.index] = 0
                if self._echo:
                    yield self._choice(delta.index, *self._echoed(delta.index))
            if self.answer.prompt_only:
                if delta.finish_reason is not None:
                    yield self._choice(delta.index, "", None) | _NOTHING_ASKED
                continue
            logprobs = self._logprobs(delta.index, delta.token_ids, delta.logprobs)
            if delta.text or logprobs or delta.finish_reason is not None:
                choice = self._choice(delta.index, delta.text, logprobs)
                yield choice | ending_json(delta)

    def whole(self) -> Json:
        choices = []
        for part in self.answer.parts:
            result = part.text.result()
            of_prompt = prompt_logprobs_json(result.prompt_logprobs or [None]) if self._show_prompt_logprobs else None
            for output in result.outputs:
                index = part.first_choice + output.index
                text, before = self._echoed(index) if self._echo else ("", None)
                if self.answer.prompt_only:
                    choice = self._choice(index, text, before) | _NOTHING_ASKED
                else:
                    logprobs = _joined(before, self._logprobs(index, output.token_ids, output.logprobs))
                    choice = self._choice(index, text + output.text, logprobs) | ending_json(output)
                choices.append(choice | {"prompt_logprobs": of_prompt})
        return self.envelope() | {"choices": choices, "usage": usage_json(self.answer)}

    def _choice(self, index: int, text: str, logprobs: Json | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _echoed(self, index: int) -> tuple[str, Json | None]:
        """The prompt of choice `index`, as text and with its logprobs if these were asked for."""
        part: Part = self.answer.parts[index // self._params.n]
        token_ids = part.request.prompt_token_ids
        text = part.text.prompt
        if text is None:
            text = self._model.decode(token_ids, self._params.skip_special_tokens)
        if self._num_logprobs is None:
            return text, None
        return text, self._logprobs(index, token_ids, part.text.prompt_logprobs() or [None])

    def _logprobs(
        self, index: int, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob] | None] | None
    ) -> Json | None:
        """Four lists with an entry for each token; `text_offset` counts characters of the choice's text."""
        if self._num_logprobs is None or entries is None:
            return None
        offset = self._offsets.get(index, 0)
        shape: dict[str, list[object]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            shape["text_offset"].append(offset)
            shape["tokens"].append(self._name(token_id))
            shape["token_logprobs"].append(entry and finite(entry[token_id].logprob))
            shape["top_logprobs"].append(entry and self._top(token_id, entry))
            offset += self._model.num_characters(token_id, self._params.skip_special_tokens)
        self._offsets[index] = offset
        return shape

    def _top(self, token_id: int, entry: dict[int, Logprob]) -> dict[str, float]:
        """The most likely tokens, and the drawn one even if it is none of them, as OpenAI does."""
        tokens = most_likely(entry, self._num_logprobs or 0)
        if token_id not in tokens:
            tokens.append(token_id)
        # Two tokens may be the same text (as of a word, and of bytes); the drawn one has the name that `tokens` has.
        names = {self._name(token_id): token_id}
        for token in tokens:
            if names.setdefault(self._name(token), token) != token:
                names[f"token_id:{token}"] = token
        name_of = {token: name for name, token in names.items()}
        return {name_of[token]: finite(entry[token].logprob) for token in tokens}

    def _name(self, token_id: int) -> str:
        """A token's text, or its bytes as OpenAI writes them if they are no text alone, as of a part of an emoji."""
        data = self._model.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _joined(first: Json | None, then: Json | None) -> Json | None:
    if first is None or then is None:
        return then
    return {name: first[name] + then[name] for name in first}
