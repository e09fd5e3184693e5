"""The Python interface: `LLM` for batches in this process, `AsyncLLM` for many callers at once.

Both turn prompts into requests and tokens into text around the same engine; `LLM` steps it itself, `AsyncLLM` talks to
one in a process of its own. Names and results are those that vLLM's users know.
"""

import itertools
import operator
import os
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from octavo.checkpoint import Checkpoint, TokenizerData, open_engine_checkpoint, open_tokenizer_data
from octavo.config import EngineOptions
from octavo.deferred_signals import DeferredSignals
from octavo.engine.engine import Engine
from octavo.engine.process import EngineClient
from octavo.engine.state import StepOutput
from octavo.engine.stream import Arrived
from octavo.errors import ConfigError, EngineDeadError, OctavoError, RequestError, nearest, short
from octavo.models import check_runnable
from octavo.progress import Progress
from octavo.request import CompletionOutput, Request, RequestOutput
from octavo.sampling_defaults import advised
from octavo.sampling_params import SamplingParams
from octavo.text.chat_template import encode_chat
from octavo.text.output import RequestText, TextDelta, bad_words_to_ids
from octavo.text.tokenizer import Tokenizer
from octavo.vllm_arguments import ANY, ENGINE, translated

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


def _open_tokenizer(options: EngineOptions, checkpoint: Checkpoint | None = None) -> tuple[dict[str, Any], Tokenizer]:
    """The model's generation_config.json, empty if there is none, and its tokenizer, or the one that was asked for."""

    def data_of(source: str) -> TokenizerData:
        return open_tokenizer_data(source, hub=options.hub, revision=options.revision)

    data = data_of(options.model) if checkpoint is None else checkpoint.tokenizer_data()
    generation_config = dict(data.generation_config)
    if options.tokenizer is not None:
        data = data_of(options.tokenizer)
    return generation_config, Tokenizer.from_data(data)


def _advised(options: EngineOptions, generation_config: dict[str, Any]) -> dict[str, Any]:
    return advised(generation_config) if options.generation_config == "auto" else {}


class LLM:
    """A model in this process. Threads may share it: their requests are computed together.

    `model` is a known name, a GGUF file, a folder or ORG/NAME of a hub; the keyword arguments are the fields of
    `octavo.config.EngineOptions`; vLLM's others are taken where they change nothing (docs/migrate.md).
    Raises `CheckpointError`, `ConfigError`, `CapacityError` or `DownloadError`.
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
        checkpoint = None if options.device == "cuda" else open_engine_checkpoint(options, check_runnable)
        with ThreadPoolExecutor(1) as beside:
            # Much of the engine's start is spent outside of Python, where a tokenizer can be built.
            opened = beside.submit(_open_tokenizer, options, checkpoint) if checkpoint else None
            self.engine = Engine.build(options, checkpoint)
            self.generation_config, self.tokenizer = opened.result() if opened else _open_tokenizer(options)
        self.tokenizer.check_vocabulary(self.engine.config.model.vocab_size)
        self.sampling_defaults = _advised(options, self.generation_config)
        self._numbers = itertools.count()
        self._calls: dict[str, _Call] = {}  # whose each open request is
        self._submitted = _Call([])
        self._lock = threading.RLock()  # over the engine and the calls
        self._num_waiting = 0  # threads that want it
        self._signals = DeferredSignals()
        self._process = os.getpid()

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
        call = _Call(self._requests(_as_list(prompts), sampling_params, None))
        order = {text.request.request_id: (i, text) for i, text in enumerate(call.open.values())}
        try:
            self._add(call)
            while call.active:
                for request_id, deltas in self._advance(call).items():
                    index, text = order[request_id]
                    yield index, text.result(), deltas
        finally:
            self._abort(call)

    def generate_iter(
        self, work: Iterable[tuple[Prompt, SamplingParams]], *, max_open: int | None = None
    ) -> Iterator[tuple[int, RequestOutput | OctavoError]]:
        """Answers any number of (prompt, sampling_params), yielding (index, output) as each is finished.

        `work` is read only as far as `max_open` unfinished requests (twice max_num_seqs by default). A request that
        cannot run, or fails, yields its error in the output's place, and the rest goes on.
        """
        limit = max_open or 2 * self.engine.config.max_num_seqs
        numbered = enumerate(work)
        call, texts = _Call([]), dict[str, tuple[int, RequestText]]()
        exhausted = False
        try:
            while True:
                while not exhausted and len(call.open) < limit:
                    index, item = next(numbered, (-1, None))
                    if item is None:
                        exhausted = True
                        break
                    try:
                        (text,) = self._requests([item[0]], item[1], None)
                    except RequestError as error:
                        yield index, error
                        continue
                    texts[text.request.request_id] = (index, text)
                    self._add(call, [text])
                if not call.active:
                    return
                for request_id in self._advance(call):
                    index, text = texts[request_id]
                    if text.finished:
                        del texts[request_id]
                        yield index, text.error or text.result()
        finally:
            self._abort(call)

    def encode_chat(self, messages: Messages, **variables: Any) -> list[int]:
        """Token ids of a conversation as the model's chat template renders it, ready for `generate` or `stream`."""
        return encode_chat(self.tokenizer, messages, **variables)

    def shutdown(self) -> None:
        """Frees the model; the object is of no more use."""
        with self._at_work():
            self.engine.shutdown()

    # ---- step by step, for a caller with a loop of its own ------------------------------------------------

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> str:
        """Queues one prompt and returns its request id; `advance` then moves it. Raises `RequestError`."""
        (text,) = self._requests([prompt], sampling_params, None)
        self._add(self._submitted, [text])
        return text.request.request_id

    def advance(self) -> list[RequestOutput]:
        """Runs one step of everything that is queued; the outputs so far of the requests that moved."""
        texts = dict(self._submitted.open)
        return [texts[request_id].result() for request_id in self._advance(self._submitted)]

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends those of the requests that still run."""
        self._abort(self._submitted, request_ids)

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no `sampling_params` are given: what the model's makers advise."""
        return SamplingParams(**self.sampling_defaults)

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
            params = given[i] if isinstance(given, Sequence) else given or self.get_default_sampling_params()
            text = read_prompt(str(next(self._numbers)), prompt, params, self.tokenizer)
            text.request.priority = priority[i] if priority is not None else 0
            self.engine.scheduler.limits.check(text.request)
            texts.append(text)
        return texts

    def _run(self, texts: list[RequestText], show: bool) -> list[RequestOutput]:
        call = _Call(texts)
        with self._signals:
            try:
                self._add(call)
                with Progress(len(texts), show) as progress:
                    while call.active:
                        for deltas in self._advance(call).values():
                            progress.tokens += sum(len(delta.token_ids) for delta in deltas)
                        progress.requests = len(texts) - len(call.open)
                        progress.show()
                        self._signals.deliver()
            finally:
                self._abort(call)
        return [text.result() for text in texts]

    # ---- the engine, one thread at a time -----------------------------------------------------------------

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The engine is this thread's; no signal's handler interrupts it. What goes wrong in it ends all open requests,
        and leaves an engine that answers the next."""
        if os.getpid() != self._process:
            raise ConfigError(
                f"this LLM was made in process {self._process}, whose threads a forked process does not have; start"
                " processes by multiprocessing's 'spawn' method and make an LLM in each"
            )
        self._num_waiting += 1
        with self._lock, self._signals:
            self._num_waiting -= 1
            try:
                yield
            except RequestError:
                raise
            except BaseException as error:
                self._start_anew(error)
                raise

    def _start_anew(self, error: BaseException) -> None:
        calls = set(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.open.clear()
            call.moved.clear()
            call.broken = EngineDeadError(f"the engine stopped in another call: {type(error).__name__}: {error}")
        self.engine.reset()

    def _add(self, call: "_Call", texts: Iterable[RequestText] | None = None) -> None:
        """Queues the requests of `call`: those that it was made with, or `texts`."""
        with self._at_work():
            for text in list(call.open.values()) if texts is None else texts:
                self.engine.add(text.request)
                call.open[text.request.request_id] = text
                self._calls[text.request.request_id] = call

    def _advance(self, call: "_Call") -> dict[str, list[TextDelta]]:
        """What has come for `call` since it last looked, by request id; if that is nothing, what one step brings."""
        if self._num_waiting:
            time.sleep(1e-5)  # a lock goes to whoever comes first, and that would be this thread again
        with self._at_work():
            if not call.moved and call.broken is None:
                assert not call.open or self.engine.has_work(), "open requests that the engine does not have"
                self._take(self.engine.step())
            moved, call.moved = call.moved, {}
            broken, call.broken = call.broken, None
        if broken is not None:
            raise broken
        return moved

    def _take(self, output: StepOutput) -> None:
        """Hands what a step brought to those whose requests these are."""
        for request_id, _, cached in output.started:
            if call := self._calls.get(request_id):
                call.open[request_id].num_cached_tokens = cached
        for request_id, start, entries in output.prompt_logprobs:
            if call := self._calls.get(request_id):
                call.open[request_id].put_prompt_logprobs(start, entries)
        for scored in output.beam_scores:
            if call := self._calls.get(scored[0]):
                call.open[scored[0]].put_beam_score(scored)
        for token in output.tokens:
            if call := self._calls.get(token[0]):
                text = call.open[token[0]]
                delta = text.push(token)
                call.moved.setdefault(token[0], []).append(delta)
                if delta.abort:
                    self.engine.abort(token[0], delta.index)
                if text.finished:
                    self._close(token[0])
        for request_id, error in output.failed:
            if call := self._calls.get(request_id):
                call.moved.setdefault(request_id, []).extend(call.open[request_id].fail(error))
                self._close(request_id)

    def _close(self, request_id: str) -> None:
        del self._calls.pop(request_id).open[request_id]

    def _abort(self, call: "_Call", request_ids: Iterable[str] | None = None) -> None:
        """Ends the requests of `call` that are open, or those of them that are named."""
        if not call.open or os.getpid() != self._process:
            return
        with self._at_work():
            for request_id in list(call.open) if request_ids is None else request_ids:
                if self._calls.get(request_id) is call:
                    self._close(request_id)
                    self.engine.abort(request_id)


class _Call:
    """The open requests of one call, and what has come for them since it last looked. `broken` is why they are gone."""

    def __init__(self, texts: Iterable[RequestText]):
        self.open = {text.request.request_id: text for text in texts}
        self.moved: dict[str, list[TextDelta]] = {}
        self.broken: OctavoError | None = None

    @property
    def active(self) -> bool:
        """Whether there is, or will be, something to look at."""
        return bool(self.open or self.moved or self.broken is not None)


class AsyncLLM:
    """A model in a process of its own, for many concurrent callers on one event loop.

    `async with AsyncLLM(...) as llm`, or `await llm.start()` and `await llm.close()`. Options are `LLM`'s.
    """

    def __init__(self, model: str | None = None, **options: Any):
        self.options = _engine_options(model, options)
        self.client = EngineClient(self.options)
        generation_config, self.tokenizer = _open_tokenizer(self.options)
        self.sampling_defaults = _advised(self.options, generation_config)
        self._numbers = itertools.count()
        self._process = os.getpid()

    async def start(self) -> "AsyncLLM":
        """Loads the model; raises what `LLM` raises."""
        info = await self.client.start()
        self.tokenizer.check_vocabulary(info.limits.vocab_size)
        return self

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM`'s."""
        return SamplingParams(**self.sampling_defaults)

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
        if os.getpid() != self._process:
            raise ConfigError("this AsyncLLM was made before a fork; make one in each process")
        request_id = request_id or f"request-{next(self._numbers)}"
        params = sampling_params or self.get_default_sampling_params()
        text = read_prompt(request_id, prompt, params, self.tokenizer)
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
    options = translated(options, ENGINE | {"served_model_name": ANY})
    known = {field.name for field in fields(EngineOptions)}
    for name in options:
        if name not in known:
            raise ConfigError(f"{name} is not an option of LLM.{nearest(name, [*known, *ENGINE])}")
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
    text = content if isinstance(content, str) and "prompt" in given else None
    ids = tokenizer.encode(text) if text is not None else _token_ids(content)
    request = Request(request_id, ids, params, cache_salt=given.get("cache_salt"))
    request.bad_words_token_ids = bad_words_to_ids(tokenizer, params.bad_words)
    return RequestText(request, tokenizer, text)


def _token_ids(content: Any) -> list[int]:
    try:
        if isinstance(content, (str, bytes, Mapping)):
            raise TypeError
        return [operator.index(token) for token in content]
    except TypeError:
        raise RequestError(
            f"the prompt is {short(content)}; it must be a text or a list of token ids", "prompt"
        ) from None


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
