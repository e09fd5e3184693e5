"""`VllmEngine`, the interface of ms-swift 3.x and 4.x: chats in, responses in OpenAI's shape out.

Chats are written by ms-swift's template of the model type where one is known, else by the model's own. With
`use_async_engine` the model runs in a process of its own, for `infer_async`; otherwise in this one, for `infer`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from octavo.checkpoint import open_tokenizer_data
from octavo.errors import ConfigError
from octavo.llm import LLM, AsyncLLM
from octavo.progress import Progress
from octavo.request import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.swift.engine import dtype_name, engine_options, refuse_parallel, warn_of_idle_cards
from octavo.swift.messages import messages_to_history
from octavo.swift.models import get_default_template_type, guess_model_type, locate
from octavo.swift.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
    DeltaMessage,
    InferRequest,
    InferStats,
    RequestConfig,
    UsageInfo,
)
from octavo.swift.template import Template
from octavo.swift.templates import check_template_type, get_template
from octavo.swift.tokenizer import HfTokenizer
from octavo.text.chat_template import encode_chat
from octavo.text.tokenizer import Tokenizer

Chunk = ChatCompletionStreamResponse
# Options of VllmEngine beyond its signature that do nothing at these values, and are refused at others.
_FIXED: dict[str, tuple[Any, ...]] = {
    "adapters": (None, []),
    "enable_lora": (False,),
    "max_loras": (1,),
    "max_lora_rank": (16,),
    "hub_token": (None,),
}


class VllmEngine:
    """A model that answers `InferRequest`s.

    `model_id_or_path` is a hub's id, a folder, a GGUF file or a known name; `model_type` and `template_type` are found
    from it where they are not given; `template` may be a bound `Template`. Other options are ms-swift's, and any field
    of `octavo.config.EngineOptions`. Raises `ConfigError`, `DownloadError`, `CheckpointError` or `CapacityError`.
    """

    def __init__(
        self,
        model_id_or_path: str,
        *,
        template: Template | None = None,
        torch_dtype: Any = None,
        use_async_engine: bool = False,
        model_type: str | None = None,
        template_type: str | None = None,
        revision: str | None = None,
        tensor_parallel_size: int = 1,
        engine_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        for name, harmless in _FIXED.items():
            if options.pop(name, harmless[0]) not in harmless:
                raise ConfigError(f"{name} is not supported yet; leave it out")
        refuse_parallel(tensor_parallel_size, "tensor_parallel_size")
        use_hf = options.pop("use_hf", None)
        seed = options.pop("seed", None)
        if seed is not None:
            options["seed"] = seed
        self.model_type = model_type or guess_model_type(model_id_or_path)
        self.model_name = model_id_or_path.rstrip("/").rpartition("/")[2]
        chosen = engine_options({**options, **(engine_kwargs or {})}, dtype=dtype_name(torch_dtype))
        if template_type is not None:
            check_template_type(template_type)
        chosen.model = locate(self.model_type, model_id_or_path, revision, use_hf=use_hf)
        self.llm: LLM | None = None
        self.async_llm: AsyncLLM | None = None
        self._starting: asyncio.Future[AsyncLLM] | None = None
        if use_async_engine:
            self.async_llm = AsyncLLM(**asdict(chosen))
            self._inner: Tokenizer = self.async_llm.tokenizer
            self._defaults = dict(open_tokenizer_data(chosen.tokenizer or chosen.model).generation_config)
        else:
            self.llm = LLM.from_options(chosen)
            self._inner, self._defaults = self.llm.tokenizer, self.llm.generation_config
            warn_of_idle_cards(self.llm.engine.config.device, tensor_parallel_size)
        self.tokenizer = HfTokenizer(self._inner, name_or_path=model_id_or_path)
        self.default_template = template or self._template(template_type)

    def _template(self, template_type: str | None) -> Template | None:
        known = template_type or (get_default_template_type(self.model_type) if self.model_type else None)
        return None if known is None else get_template(known, self.tokenizer)

    # ---- answering ----------------------------------------------------------------------------------------

    def infer(
        self,
        infer_requests: Sequence[InferRequest | Mapping[str, Any]],
        request_config: RequestConfig | None = None,
        metrics: Sequence[InferStats] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[Any]:
        """A `ChatCompletionResponse` for each request; with `stream=True`, an iterator over each one's pieces.

        The iterators share the engine: whichever is read moves all. Closing one ends its request.
        """
        if self.llm is None:
            raise ConfigError("infer is for an engine in this process; make it with use_async_engine=False")
        config = request_config or RequestConfig()
        pump = _Pump(self.llm)
        answers = []
        for request in infer_requests:
            prompt = self._encode(request)
            params = self._params(config, self.llm.engine.scheduler.limits.room(len(prompt), config.n))
            answers.append(_Answer(self.model_name, prompt, config, self._inner))
            pump.add(prompt, params)
        if config.stream:
            return [self._pieces(pump, index, answer, metrics or ()) for index, answer in enumerate(answers)]
        with Progress(len(answers), bool(use_tqdm)) as progress:
            while pump.open:
                progress.requests = len(answers) - len(pump.open)
                progress.show()
                pump.step()
            progress.requests = len(answers)
        responses = [answer.whole(pump.last[index]) for index, answer in enumerate(answers)]
        for response in responses:
            _count(metrics or (), response)
        return responses

    async def infer_async(
        self, infer_request: InferRequest | Mapping[str, Any], request_config: RequestConfig | None = None
    ) -> ChatCompletionResponse | AsyncIterator[Chunk]:
        """The response to one request, or an iterator over its pieces; many may be under way at once."""
        if self.async_llm is None:
            raise ConfigError("infer_async needs an engine made with use_async_engine=True")
        config = request_config or RequestConfig()
        if self._starting is None:
            self._starting = asyncio.ensure_future(self.async_llm.start())
        await asyncio.shield(self._starting)
        info = self.async_llm.client.info
        assert info is not None, "a started engine has told what it is"
        prompt = self._encode(infer_request)
        params = self._params(config, info.limits.room(len(prompt), config.n))
        answer = _Answer(self.model_name, prompt, config, self._inner)
        if config.stream:
            return self._async_pieces(answer, params)
        samples = [CompletionOutput(index, "", []) for index in range(config.n)]
        whole: RequestOutput | None = None
        async for whole in self.async_llm.generate(prompt, params):
            for new in whole.outputs:
                _extend(samples[new.index], new)
        assert whole is not None, "an answer has at least one piece"
        whole.outputs = samples
        return answer.whole(whole)

    async def _async_pieces(self, answer: "_Answer", params: SamplingParams) -> AsyncIterator[Chunk]:
        assert self.async_llm is not None, "the caller looked"
        samples = [CompletionOutput(index, "", []) for index in range(params.n)]
        async for output in self.async_llm.generate(answer.prompt, params):
            for new in output.outputs:
                _extend(samples[new.index], new)
            piece = answer.piece(samples)
            if piece is not None:
                yield piece

    def _pieces(self, pump: "_Pump", index: int, answer: "_Answer", metrics: Sequence[InferStats]) -> Iterator[Chunk]:
        try:
            for output in pump.outputs_of(index):
                piece = answer.piece(output.outputs)
                if piece is not None:
                    _count(metrics, piece)
                    yield piece
        finally:
            pump.cancel(index)

    def shutdown(self) -> None:
        """Frees the model of an engine in this process; the object is of no more use."""
        if self.llm is not None:
            self.llm.shutdown()

    async def close(self) -> None:
        """Stops the process of an engine made with `use_async_engine`."""
        if self.async_llm is not None:
            await self.async_llm.close()

    # ---- prompts ------------------------------------------------------------------------------------------

    def _encode(self, request: InferRequest | Mapping[str, Any]) -> list[int]:
        """Token ids of a chat. A last answer, as data sets have it, is left out."""
        asked = request if isinstance(request, InferRequest) else InferRequest(**request)
        messages = asked.messages
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if self.default_template is None:
            return encode_chat(self._inner, messages, tools=asked.tools, **asked.chat_template_kwargs)
        if asked.chat_template_kwargs:
            raise ConfigError(
                "chat_template_kwargs are for the model's own template, but template"
                f" {self.default_template.template_type!r} is in use; leave them out"
            )
        parts = messages_to_history(messages)
        wanted = {name: parts[name] for name in ("system", "history", "history_roles", "query", "query_role")}
        ids: list[int] = self.default_template.encode({**wanted, "tools": asked.tools})[0].get("input_ids", [])
        return ids

    def _params(self, config: RequestConfig, room: int) -> SamplingParams:
        stops = [] if self.default_template is None else self.default_template.stop_texts()
        ids = [index for stop in stops if (index := self._inner.token_id(stop)) is not None]
        return config.sampling_params(self._defaults, room, stops, ids)


class _Pump:
    """Requests in one engine, each read on its own; reading any of them steps the engine for all."""

    def __init__(self, llm: LLM):
        self.last: list[RequestOutput] = []
        self.open: dict[str, int] = {}  # request id -> index
        self._llm = llm
        self._waiting: list[deque[RequestOutput]] = []
        self._names: list[str] = []

    def add(self, prompt: list[int], params: SamplingParams) -> None:
        try:
            name = self._llm.submit(prompt, params)
        except BaseException:
            self._llm.cancel(self._names)
            raise
        self.open[name] = len(self._names)
        self._names.append(name)
        self._waiting.append(deque())
        self.last.append(RequestOutput(name, None, prompt, [], False))

    def step(self) -> None:
        for output in self._llm.advance():
            index = self.open.get(output.request_id)
            if index is not None:
                self.last[index] = output
                self._waiting[index].append(output)
                if output.finished:
                    del self.open[output.request_id]

    def outputs_of(self, index: int) -> Iterator[RequestOutput]:
        waiting = self._waiting[index]
        while waiting or self._names[index] in self.open:
            if waiting:
                yield waiting.popleft()
            else:
                self.step()

    def cancel(self, index: int) -> None:
        self._llm.cancel([self._names[index]])
        self.open.pop(self._names[index], None)


class _Answer:
    """Turns the outputs of one request into responses."""

    def __init__(self, model: str, prompt: list[int], config: RequestConfig, tokenizer: Tokenizer):
        self.prompt = prompt
        self._model = model
        self._config = config
        self._tokenizer = tokenizer
        self._shown = [0] * config.n  # characters of each sample that left
        self._ended = [False] * config.n
        self._told = [0] * config.n  # tokens of each sample whose logprobs left
        self._id: str | None = None

    def whole(self, output: RequestOutput) -> ChatCompletionResponse:
        details = self._config.return_details
        choices = [
            ChatCompletionResponseChoice(
                sample.index,
                ChatMessage("assistant", sample.text),
                sample.finish_reason,
                self._logprobs(sample, 0),
                sample.token_ids if details else None,
            )
            for sample in output.outputs
        ]
        return ChatCompletionResponse(
            self._model,
            choices,
            self._usage(output.outputs),
            prompt_token_ids=self.prompt if details else None,
            prompt_logprobs=output.prompt_logprobs,
        )

    def piece(self, samples: Sequence[CompletionOutput]) -> Chunk | None:
        """What is new since the last piece; None if nothing is."""
        choices = []
        for sample in samples:
            text = sample.text[self._shown[sample.index] :]
            ends = sample.finish_reason is not None and not self._ended[sample.index]
            if text or ends:
                logprobs = self._logprobs(sample, self._told[sample.index])
                delta = DeltaMessage("assistant", text)
                choices.append(ChatCompletionResponseStreamChoice(sample.index, delta, sample.finish_reason, logprobs))
                self._shown[sample.index] += len(text)
                self._told[sample.index] = len(sample.token_ids)
                self._ended[sample.index] = sample.finish_reason is not None
        if not choices:
            return None
        chunk = Chunk(self._model, choices, self._usage(samples))
        chunk.id = self._id = self._id or chunk.id
        return chunk

    def _usage(self, samples: Sequence[CompletionOutput]) -> UsageInfo:
        generated = sum(len(sample.token_ids) for sample in samples)
        return UsageInfo(len(self.prompt), generated, len(self.prompt) + generated)

    def _logprobs(self, sample: CompletionOutput, start: int) -> dict[str, list[dict[str, Any]]] | None:
        if sample.logprobs is None:
            return None
        content = []
        for token_id, entry in zip(sample.token_ids[start:], sample.logprobs[start:], strict=True):
            ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
            top = [self._token(index, found.logprob) for index, found in ranked[: self._config.top_logprobs or 0]]
            content.append({**self._token(token_id, entry[token_id].logprob), "top_logprobs": top})
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        written = self._tokenizer.token_bytes(token_id)
        return {"token": written.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(written)}


def _extend(sample: CompletionOutput, new: CompletionOutput) -> None:
    sample.text += new.text
    sample.token_ids += new.token_ids
    if new.logprobs is not None:
        sample.logprobs = (sample.logprobs or []) + new.logprobs
    sample.finish_reason = new.finish_reason or sample.finish_reason


def _count(metrics: Sequence[InferStats], response: ChatCompletionResponse | Chunk) -> None:
    for metric in metrics:
        metric.update(response)
