"""The Python interface: `LLM` for batches in this process, `AsyncLLM` for many callers at once.

Both turn prompts into requests and tokens into text around the same engine; `LLM` steps it itself, `AsyncLLM` talks to
one in a process of its own. Names and results are those that vLLM's users know.
"""

import itertools
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from octavo.checkpoint import Checkpoint, TokenizerData, open_engine_checkpoint, open_tokenizer_data
from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.engine.process import EngineClient
from octavo.engine.stream import Arrived
from octavo.errors import ConfigError, RequestError, nearest
from octavo.progress import Progress
from octavo.request import CompletionOutput, Request, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.text.chat_template import encode_chat
from octavo.text.output import RequestText, TextDelta, bad_words_to_ids
from octavo.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


def _open_tokenizer(options: EngineOptions, checkpoint: Checkpoint | None) -> tuple[TokenizerData, Tokenizer]:
    if checkpoint is not None and options.tokenizer is None:
        data = checkpoint.tokenizer_data()
    else:
        data = open_tokenizer_data(options.tokenizer or options.model, hub=options.hub, revision=options.revision)
    return data, Tokenizer.from_data(data)


class LLM:
    """A model in this process.

    `model` is a known name, a GGUF file, a folder or ORG/NAME of a hub; the keyword arguments are the fields of
    `octavo.config.EngineOptions`. Raises `CheckpointError`, `ConfigError`, `CapacityError` or `DownloadError`.
    """

    def __init__(self, model: str | None = None, **options: Any):
        self._open(_engine_options(model, options))

    @classmethod
    def from_options(cls, options: EngineOptions) -> "LLM":
        """An LLM with all options in one object."""
        llm = cls.__new__(cls)
        llm._open(options)
        return llm

    def _open(self, options: EngineOptions) -> None:
        self.options = options
        # A wrong device must show before a model is fetched for it; else the files are opened once for both.
        checkpoint = None if options.device == "cuda" else open_engine_checkpoint(options)
        with ThreadPoolExecutor(1) as beside:
            # Much of the engine's start is spent outside of Python, where a tokenizer can be built.
            opened = beside.submit(_open_tokenizer, options, checkpoint) if checkpoint else None
            self.engine = Engine.build(options, checkpoint)
            data, self.tokenizer = opened.result() if opened else _open_tokenizer(options, None)
        self.tokenizer.check_vocabulary(self.engine.config.model.vocab_size)
        # What the model's makers advise for sampling (generation_config.json); empty if they say nothing.
        self.generation_config: dict[str, Any] = dict(data.generation_config)
        self._numbers = itertools.count()
        self._texts: dict[str, RequestText] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers `prompts` together, in their order.

        A prompt is a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids`, and perhaps
        `cache_salt`. One `sampling_params` serves all prompts, or there is one for each. `use_tqdm` shows a bar on
        a terminal. Raises `RequestError` before anything runs if one of the prompts cannot.
        """
        return self._run(self._requests(_as_list(prompts), sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages with role and content) or several."""
        chats: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        template = self.tokenizer.make_template(chat_template) if chat_template else None
        prompts = [
            encode_chat(
                self.tokenizer,
                chat,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template=template,
                **(chat_template_kwargs or {}),
            )
            for chat in chats
        ]
        return self._run(self._requests(prompts, sampling_params, None), use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, RequestOutput, list[TextDelta]]]:
        """Answers `prompts` together, step by step.

        Yields (index of the prompt, its output so far, what this step added) for each prompt that moved in a step.
        Closing the iterator aborts what still runs.
        """
        texts = self._requests(_as_list(prompts), sampling_params, None)
        order = {text.request.request_id: i for i, text in enumerate(texts)}
        self._add(texts)
        try:
            while any(request_id in self._texts for request_id in order):
                for request_id, deltas in self._step().items():
                    if request_id in order:
                        yield order[request_id], self._texts[request_id].result(), deltas
                        self._drop_finished(request_id)
        finally:
            self._abort(order)

    def generate_iter(
        self, work: Iterable[tuple[Prompt, SamplingParams]], *, max_open: int | None = None
    ) -> Iterator[tuple[int, RequestOutput | RequestError]]:
        """Answers any number of (prompt, sampling_params), yielding (index, output) as each is finished.

        `work` is read only as far as `max_open` unfinished requests (twice max_num_seqs by default). A request that
        cannot run yields its error in the output's place, and the rest goes on.
        """
        limit = max_open or 2 * self.engine.config.max_num_seqs
        numbered = enumerate(work)
        open_texts: dict[str, tuple[int, RequestText]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(open_texts) < limit:
                    index, item = next(numbered, (-1, None))
                    if item is None:
                        exhausted = True
                        break
                    try:
                        (text,) = self._requests([item[0]], item[1], None)
                    except RequestError as error:
                        yield index, error
                        continue
                    self._add([text])
                    open_texts[text.request.request_id] = (index, text)
                if not open_texts:
                    return
                for request_id in self._step():
                    if request_id in open_texts and self._drop_finished(request_id):
                        index, text = open_texts.pop(request_id)
                        yield index, text.result()
        finally:
            self._abort(open_texts)

    def encode_chat(self, messages: Messages, **variables: Any) -> list[int]:
        """Token ids of a conversation as the model's chat template renders it, ready for `generate` or `stream`."""
        return encode_chat(self.tokenizer, messages, **variables)

    def shutdown(self) -> None:
        """Frees the model; the object is of no more use."""
        self.engine.shutdown()

    # ---- step by step, for a caller with a loop of its own ------------------------------------------------

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> str:
        """Queues one prompt and returns its request id; `advance` then moves it. Raises `RequestError`."""
        (text,) = self._requests([prompt], sampling_params, None)
        self._add([text])
        return text.request.request_id

    def advance(self) -> list[RequestOutput]:
        """Runs one step of everything that is queued; the outputs so far of the requests that moved."""
        moved = [self._texts[request_id].result() for request_id in self._step()]
        for output in moved:
            self._drop_finished(output.request_id)
        return moved

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends those of the requests that still run."""
        self._abort(request_ids)

    # ---- from prompts to results --------------------------------------------------------------------------

    def _requests(
        self,
        prompts: Sequence[Prompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[RequestText]:
        if isinstance(given, Sequence) and len(given) != len(prompts):
            raise RequestError(
                f"there are {len(prompts)} prompts but {len(given)} sampling_params; give one, or one for each prompt",
                "sampling_params",
            )
        texts = []
        for i, prompt in enumerate(prompts):
            params = given[i] if isinstance(given, Sequence) else given or SamplingParams()
            text = read_prompt(str(next(self._numbers)), prompt, params, self.tokenizer)
            text.request.priority = priority[i] if priority is not None else 0
            self.engine.scheduler.limits.check(text.request)
            texts.append(text)
        return texts

    def _run(self, texts: list[RequestText], show: bool) -> list[RequestOutput]:
        self._add(texts)
        ids = [text.request.request_id for text in texts]
        try:
            with Progress(len(texts), show) as progress:
                while any(request_id in self._texts for request_id in ids):
                    for request_id, deltas in self._step().items():
                        progress.tokens += sum(len(delta.token_ids) for delta in deltas)
                        progress.requests += self._drop_finished(request_id)
                    progress.show()
        finally:
            self._abort(ids)
        return [text.result() for text in texts]

    def _add(self, texts: list[RequestText]) -> None:
        for text in texts:
            self.engine.add(text.request)
            self._texts[text.request.request_id] = text

    def _step(self) -> dict[str, list[TextDelta]]:
        """One step of the engine: what it added, by request id."""
        output = self.engine.step()
        moved: dict[str, list[TextDelta]] = {}
        for request_id, _, cached in output.started:
            if request_id in self._texts:
                self._texts[request_id].num_cached_tokens = cached
        for request_id, start, entries in output.prompt_logprobs:
            if request_id in self._texts:
                self._texts[request_id].put_prompt_logprobs(start, entries)
        for scored in output.beam_scores:
            if scored[0] in self._texts:
                self._texts[scored[0]].put_beam_score(scored)
        for token in output.tokens:
            text = self._texts.get(token[0])
            if text is not None:
                delta = text.push(token)
                moved.setdefault(token[0], []).append(delta)
                if delta.abort:
                    self.engine.abort(token[0], delta.index)
        return moved

    def _drop_finished(self, request_id: str) -> bool:
        finished = request_id in self._texts and self._texts[request_id].finished
        if finished:
            del self._texts[request_id]
        return finished

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self._texts.pop(request_id, None) is not None:
                self.engine.abort(request_id)


class AsyncLLM:
    """A model in a process of its own, for many concurrent callers on one event loop.

    `async with AsyncLLM(...) as llm`, or `await llm.start()` and `await llm.close()`. Options are `LLM`'s.
    """

    def __init__(self, model: str | None = None, **options: Any):
        self.options = _engine_options(model, options)
        self.client = EngineClient(self.options)
        source = self.options.tokenizer or self.options.model
        self.tokenizer = Tokenizer.load(source, hub=self.options.hub, revision=self.options.revision)
        self._numbers = itertools.count()

    async def start(self) -> "AsyncLLM":
        """Loads the model; raises what `LLM` raises."""
        info = await self.client.start()
        self.tokenizer.check_vocabulary(info.limits.vocab_size)
        return self

    async def close(self) -> None:
        """Stops the engine process."""
        await self.client.close()

    async def __aenter__(self) -> "AsyncLLM":
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Answers `prompt` in deltas: each output holds only the text, tokens and logprobs that are new.

        A caller that stops iterating aborts the request. Raises `RequestError`, `QueueFullError` or `EngineDeadError`.
        """
        request_id = request_id or f"request-{next(self._numbers)}"
        text = read_prompt(request_id, prompt, sampling_params or SamplingParams(), self.tokenizer)
        text.request.priority = priority
        stream = self.client.submit(text.request)
        try:
            async for arrived in stream:
                deltas = self._push(text, arrived)
                if deltas:
                    yield _delta_output(text, deltas)
                if text.finished:
                    return
        finally:
            self.client.abort(request_id)

    async def chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **variables: Any
    ) -> AsyncGenerator[RequestOutput]:
        """Answers a conversation in deltas; `variables` go to the chat template."""
        prompt = encode_chat(self.tokenizer, messages, **variables)
        async for output in self.generate(prompt, sampling_params):
            yield output

    def abort(self, request_id: str) -> None:
        """Ends a request; its reader gets no more."""
        self.client.abort(request_id)

    def _push(self, text: RequestText, arrived: Arrived) -> list[TextDelta]:
        if arrived.queue_seconds is not None:
            text.num_cached_tokens = arrived.cached_tokens
        for start, entries in arrived.prompt_logprobs:
            text.put_prompt_logprobs(start, entries)
        for scored in arrived.beam_scores:
            text.put_beam_score(scored)
        deltas = [text.push(token) for token in arrived.tokens]
        for delta in deltas:
            if delta.abort:
                self.client.abort(text.request.request_id, delta.index)
        return deltas


# ---- what both share ------------------------------------------------------------------------------------------


def _engine_options(model: str | None, options: dict[str, Any]) -> EngineOptions:
    known = {field.name for field in fields(EngineOptions)}
    for name in options:
        if name not in known:
            raise ConfigError(f"{name} is not an option of LLM.{nearest(name, known)}")
    return EngineOptions(**options) if model is None else EngineOptions(model=model, **options)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def read_prompt(request_id: str, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer) -> RequestText:
    """A request for `prompt` and the place where its answer gathers.

    A text is encoded as it stands: the texts of special tokens in it become these tokens.
    """
    given: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    known = {"prompt", "prompt_token_ids", "cache_salt"}
    if set(given) - known or len({"prompt", "prompt_token_ids"} & set(given)) != 1:
        raise RequestError(
            f"a prompt given as a mapping has either prompt or prompt_token_ids, and may have cache_salt; this one has"
            f" {sorted(given)}",
            "prompt",
        )
    content = given.get("prompt", given.get("prompt_token_ids"))
    text = content if isinstance(content, str) else None
    ids = tokenizer.encode(text) if text is not None else list(content)
    request = Request(request_id, ids, params, cache_salt=given.get("cache_salt"))
    request.bad_words_token_ids = bad_words_to_ids(tokenizer, params.bad_words)
    return RequestText(request, tokenizer, text)


def _delta_output(text: RequestText, deltas: list[TextDelta]) -> RequestOutput:
    """The deltas of one moment as an output, one entry a sequence."""
    new: dict[int, CompletionOutput] = {}
    for delta in deltas:
        output = new.setdefault(delta.index, CompletionOutput(delta.index, "", []))
        output.text += delta.text
        output.token_ids += delta.token_ids
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + delta.logprobs
        output.finish_reason = delta.finish_reason or output.finish_reason
        output.stop_reason = delta.stop_reason if delta.stop_reason is not None else output.stop_reason
        if delta.beam_score is not None:
            output.cumulative_logprob, output.beam_score = delta.cumulative_logprob, delta.beam_score
    whole = text.result()
    whole.outputs = list(new.values())
    return whole
