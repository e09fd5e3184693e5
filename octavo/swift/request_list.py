"""`inference_vllm` and `inference_stream_vllm`: lists of requests in, lists of responses out, with ms-swift's shapes.

A request is a dict with query, history, system; a response has response and history, and logprobs if they were asked
for. What a prompt looks like, the template knows; what a step is, the engine.
"""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ConfigError, nearest
from octavo.log import logger
from octavo.progress import Progress
from octavo.request import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.swift.engine import LoRARequest, SwiftEngine, refuse_lora
from octavo.swift.generation_config import VllmGenerationConfig
from octavo.swift.template import STRATEGIES, Template

Info = dict[str, Any]
Response = dict[str, Any]

# A query that follows this continues the last answer: it is what a tool found.
OBSERVATION = "Observation:"


def inference_vllm(
    llm_engine: SwiftEngine,
    template: Template,
    request_list: Sequence[dict[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: Info | None = None,
    max_batch_size: int | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
    verbose: bool = False,
    prompt_prefix: str = "[PROMPT]",
    output_prefix: str = "[OUTPUT]",
    **kwargs: Any,
) -> list[Response]:
    """Answers all requests together; responses stand in the order of `request_list`.

    A prompt that is too long for `template.max_length` or for the context has an empty response.

    `generation_info` is cleared, then filled with num_prompt_tokens, num_generated_tokens, num_samples, runtime
    (seconds), samples/s and tokens/s. `max_batch_size` cuts a long list into parts that run one after another.
    `verbose` prints every prompt and answer with its special tokens.
    """
    assert not (use_tqdm and verbose), "use_tqdm and verbose both write to the terminal; choose one"
    if not request_list:
        return []
    began = time.perf_counter()
    info = {} if generation_info is None else generation_info
    info.clear()
    size = max_batch_size or len(request_list)
    responses: list[Response] = []
    for start in range(0, len(request_list), size):
        job = _Job(
            llm_engine,
            template,
            request_list[start : start + size],
            generation_config=generation_config,
            info=info,
            lora_request=lora_request,
            options=kwargs,
        )
        try:
            with Progress(len(job.open), use_tqdm) as progress:
                for outputs in job.steps():
                    for output in outputs:
                        if output.finished:
                            job.take(output)
                            progress.requests += 1
                            progress.tokens += sum(len(sample.token_ids) for sample in output.outputs)
                            if verbose:
                                _print(template, output, prompt_prefix, output_prefix)
                    progress.show()
        finally:
            job.close()
        responses += [response for response in job.responses if response is not None]
    _time(info, began, info["num_samples"])
    return responses


def inference_stream_vllm(
    llm_engine: SwiftEngine,
    template: Template,
    request_list: Sequence[dict[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: Info | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
    flush_steps: int | None = None,
    **kwargs: Any,
) -> Iterator[list[Response | None]]:
    """Answers all requests together and yields the responses so far, always as the same list.

    A slot is None until its request first reports, then a new dict each time, whose text only grows. It reports every
    `flush_steps` steps (10, or the number of requests if that is less) and when it is finished. `generation_info` is
    up to date at each yield. Leaving the loop ends the requests.
    """
    if not request_list:
        return
    began = time.perf_counter()
    info = {} if generation_info is None else generation_info
    info.clear()
    job = _Job(
        llm_engine,
        template,
        request_list,
        generation_config=generation_config,
        info=info,
        lora_request=lora_request,
        options=kwargs,
    )
    every = flush_steps or max(1, min(10, info["num_samples"]))
    finished = 0
    try:
        with Progress(len(job.open), use_tqdm) as progress:
            for number, outputs in enumerate(job.steps(), 1):
                told = [output for output in outputs if output.finished or number % every == 0]
                for output in outputs:
                    job.watch(output)
                for output in told:
                    job.take(output)
                finished += sum(output.finished for output in told)
                progress.requests, progress.tokens = finished, info["num_generated_tokens"]
                progress.show()
                if told:
                    _time(info, began, finished)
                    yield job.responses
    finally:
        job.close()


def add_vllm_request(
    llm_engine: SwiftEngine,
    inputs: dict[str, Any],
    *,
    request_id: str,
    generation_config: VllmGenerationConfig,
    lora_request: LoRARequest | None = None,
) -> None:
    """Queues what `Template.encode` gave; `llm_engine.step()` then moves it. The config's own stops count only."""
    refuse_lora(lora_request)
    params = generation_config.sampling_params([], [])
    llm_engine.add_request(request_id, {"prompt_token_ids": inputs["input_ids"]}, params)


@dataclass(slots=True)
class _Answer:
    """One request's answer in the making."""

    query: str | None
    history: list[Any]
    continued: str | None  # the last answer with the observation, if the query was one
    started: bool = False
    counted: int = 0  # tokens of all samples that are in the info already
    shown: int = 0  # characters that were told
    marks: list[tuple[int, int]] = field(default_factory=list)  # (tokens, characters) after each step


class _Job:
    """A list of requests on its way through the engine."""

    def __init__(
        self,
        engine: SwiftEngine,
        template: Template,
        requests: Sequence[dict[str, Any]],
        *,
        generation_config: VllmGenerationConfig | None,
        info: Info,
        lora_request: LoRARequest | None,
        options: dict[str, Any],
    ):
        refuse_lora(lora_request)
        template = _with_options(template, options)
        config = engine.generation_config if generation_config is None else generation_config
        assert isinstance(config, VllmGenerationConfig), (
            f"generation_config is of type {type(config).__name__}; give a VllmGenerationConfig"
        )
        self.engine = engine
        self.info = info
        self.responses: list[Response | None] = [None] * len(requests)
        self.open: dict[str, tuple[int, _Answer]] = {}
        self._strip = engine.hf_tokenizer.inner.strips_space
        self._held = template.held_tokens()
        for name in ("num_prompt_tokens", "num_generated_tokens", "num_samples"):
            info.setdefault(name, 0)
        stops = template.stop_texts()
        ids = [index for stop in stops if (index := engine.hf_tokenizer.inner.token_id(stop)) is not None]
        params = config.sampling_params(stops, ids)
        prepared = [_prepare(template, deepcopy(request)) for request in requests]
        try:
            for index, (answer, token_ids) in enumerate(prepared):
                if token_ids is None or not self._has_room(index, token_ids, params):
                    self.responses[index] = {"response": "", "history": answer.history}
                    continue
                name = f"{id(self)}-{index}"
                engine.add_request(name, {"prompt_token_ids": token_ids}, params)
                self.open[name] = (index, answer)
                info["num_prompt_tokens"] += len(token_ids)
                info["num_samples"] += 1
        except BaseException:
            self.close()
            raise

    def _has_room(self, index: int, token_ids: list[int], params: SamplingParams) -> bool:
        """Whether the context has room for an answer; else says so, since the other requests go on."""
        limits = self.engine.llm.engine.scheduler.limits
        if limits.room(len(token_ids), params.num_sequences) > 0:
            return True
        logger.warning(
            "request %d of the list is not answered: its prompt has %d tokens, and the context of %d has no room for an"
            " answer; shorten it, or set max_length and truncation_strategy",
            *(index, len(token_ids), limits.max_model_len),
        )
        return False

    def steps(self) -> Iterator[list[RequestOutput]]:
        """Outputs of this job's requests, step by step, until all are finished."""
        left = set(self.open)
        while left:
            outputs = [output for output in self.engine.step() if output.request_id in left]
            left.difference_update(output.request_id for output in outputs if output.finished)
            yield outputs

    def watch(self, output: RequestOutput) -> None:
        """Remembers how long the text was after how many tokens."""
        sample = output.outputs[0]
        self.open[output.request_id][1].marks.append((len(sample.token_ids), len(self._text(output))))

    def take(self, output: RequestOutput) -> None:
        """Puts an output, finished or not, into the response of its request, and its tokens into the info."""
        index, answer = self.open[output.request_id]
        text = self._text(output)
        if not output.finished:
            text = self._safe_part(answer, text, len(output.outputs[0].token_ids))
        tokens = sum(len(sample.token_ids) for sample in output.outputs)
        self.info["num_generated_tokens"] += tokens - answer.counted
        answer.counted = tokens
        if answer.continued is not None:
            answer.history[-1][-1] = answer.continued + text
        elif answer.started:
            answer.history[-1] = [answer.query, text]
        else:
            answer.history.append([answer.query, text])
        answer.started = True
        response = {"response": text, "history": answer.history}
        if output.outputs[0].logprobs is not None:
            response["logprobs"] = output.outputs[0].logprobs
        self.responses[index] = response

    def close(self) -> None:
        """Ends what still runs."""
        self.engine.abort_request(self.open)

    def _text(self, output: RequestOutput) -> str:
        text = output.outputs[0].text
        return text.removeprefix(" ") if self._strip else text

    def _safe_part(self, answer: _Answer, text: str, num_tokens: int) -> str:
        """What of an unfinished text may be told: not its last tokens, and whole words only."""
        marks = answer.marks
        while len(marks) > 1 and marks[1][0] <= num_tokens - self._held:
            marks.pop(0)
        known = marks[0][1] if marks and marks[0][0] <= num_tokens - self._held else 0
        part = text[:known]
        if part.endswith("\n") or (part and _is_cjk(part[-1])):
            answer.shown = max(answer.shown, len(part))
        else:
            answer.shown = max(answer.shown, part.rfind(" ") + 1)
        return text[: answer.shown]


def _prepare(template: Template, request: dict[str, Any]) -> tuple[_Answer, list[int] | None]:
    """The answer to be filled and the prompt's token ids; None if the prompt is too long and to be deleted."""
    history = list(request.get("history") or ())
    query, continued = request.get("query"), None
    if history and history[-1][-1] and history[-1][-1].endswith(OBSERVATION):
        continued = history[-1][-1] + (query or "")
        history[-1] = [*history[-1][:-1], continued]
        request["query"] = None
    request["history"] = history
    token_ids: list[int] | None = template.encode(request)[0].get("input_ids")
    return _Answer(query, history, continued), token_ids


def _with_options(template: Template, options: dict[str, Any]) -> Template:
    """The template, under the truncation strategy of this call if one is given."""
    for name in options:
        if name != "truncation_strategy":
            known = {*inference_stream_vllm.__annotations__, *inference_vllm.__annotations__, "truncation_strategy"}
            raise ConfigError(f"{name} is not an option of inference.{nearest(name, known - {'kwargs', 'return'})}")
        if options[name] not in STRATEGIES:
            raise ConfigError(f"{name} is {options[name]!r}; choose one of {', '.join(STRATEGIES)}")
        template = deepcopy(template)
        template.truncation_strategy = options[name]
    return template


def _time(info: Info, began: float, samples: int) -> None:
    info["runtime"] = time.perf_counter() - began
    info["samples/s"] = samples / info["runtime"]
    info["tokens/s"] = info["num_generated_tokens"] / info["runtime"]


def _print(template: Template, output: RequestOutput, prompt_prefix: str, output_prefix: str) -> None:
    assert template.tokenizer is not None, "it has encoded the prompt"
    prompt, answer = (template.tokenizer.decode(ids) for ids in (output.prompt_token_ids, output.outputs[0].token_ids))
    print(f"{prompt_prefix}{prompt}{output_prefix}{answer}")


# Where a reader may break a line without a space: ideographs, by their blocks in Unicode.
_CJK = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


def _is_cjk(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CJK)
