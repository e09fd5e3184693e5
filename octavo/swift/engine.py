"""`get_vllm_engine`: an Octavo engine with the attributes that ms-swift's users read.

The engine runs in this process. Nothing here loads torch until an engine is made.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from octavo.config import EngineConfig, EngineOptions, expanded
from octavo.errors import ConfigError, RequestError, nearest
from octavo.llm import LLM
from octavo.log import logger
from octavo.request import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.swift.generation_config import VllmGenerationConfig
from octavo.swift.models import get_default_template_type, guess_model_type, locate
from octavo.swift.tokenizer import HfTokenizer
from octavo.vllm_arguments import ENGINE, translated

DTYPES = {None: "auto", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter to answer with. Octavo has no adapters yet, so whatever takes one refuses it."""

    lora_name: str
    lora_int_id: int
    lora_local_path: str


class SwiftEngine:
    """An engine, a step at a time, with what ms-swift sets on vLLM's.

    `engine_args` is what was asked for and `model_config` what runs; `generation_config` is the default of every
    inference and may be changed.
    """

    is_multimodal = False

    def __init__(self, llm: LLM, model_type: str | None, template_type: str | None):
        self.llm = llm
        self.engine_args: EngineOptions = llm.options
        self.model_type = model_type
        self.model_config: EngineConfig = llm.engine.config
        self.max_model_len = self.model_config.max_model_len
        path = expanded(llm.options.model)
        self.model_dir = str(path if path.is_dir() else path.parent) if path.exists() else llm.options.model
        self.generation_config = VllmGenerationConfig.from_model(llm.generation_config)
        self.hf_tokenizer = HfTokenizer(
            llm.tokenizer, name_or_path=llm.options.model, model_max_length=self.max_model_len
        )
        if self.model_config.model.architecture == "QWenLMHeadModel":
            # Qwen v1's files name no EOS: what ends an answer depends on whether it is a chat.
            self.hf_tokenizer.eos_token = "<|im_end|>" if template_type == "qwen" else "<|endoftext|>"
        self._names: dict[str, str] = {}  # the engine's request ids -> the caller's

    @property
    def dtype(self) -> Any:
        """The type of weights and activations, as a `torch.dtype`."""
        import torch

        return getattr(torch, self.model_config.dtype)

    def add_request(
        self, request_id: str, inputs: Mapping[str, Any], params: SamplingParams, lora_request: None = None
    ) -> None:
        """Queues a prompt ({"prompt_token_ids": ...} or {"prompt": ...}). Raises `RequestError`.

        As in vLLM, an answer that would not fit the context is cut there: `max_tokens` may be too large.
        """
        refuse_lora(lora_request)
        if request_id in self._names.values():
            raise RequestError(f"request id {request_id!r} is in use; give each open request its own", "request_id")
        prompt = dict(inputs)
        if "prompt" in prompt:
            prompt = {"prompt_token_ids": self.hf_tokenizer.encode(prompt["prompt"])}
        room = self.llm.engine.scheduler.limits.room(len(prompt["prompt_token_ids"]), params.n)
        if room > 0 and (params.max_tokens is None or params.max_tokens > room):
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        self._names[self.llm.submit(prompt, params)] = request_id

    def step(self) -> list[RequestOutput]:
        """Runs one step; the outputs so far of the requests that moved, under their own ids."""
        outputs = []
        for output in self.llm.advance():
            name = self._names.pop(output.request_id) if output.finished else self._names[output.request_id]
            outputs.append(replace(output, request_id=name))
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self._names)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Ends those of the requests that still run."""
        wanted = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        ended = [inner for inner, name in self._names.items() if name in wanted]
        self.llm.cancel(ended)
        for inner in ended:
            del self._names[inner]

    def shutdown(self) -> None:
        """Frees the model; the object is of no more use."""
        self.llm.shutdown()


def get_vllm_engine(
    model_type: str | None,
    torch_dtype: Any = None,
    *,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    max_num_seqs: int | None = 256,
    max_model_len: int | None = None,
    disable_custom_all_reduce: bool = True,
    enforce_eager: bool = False,
    limit_mm_per_prompt: Mapping[str, Any] | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    use_async: bool = False,
    enable_lora: bool = False,
    max_loras: int = 1,
    max_lora_rank: int = 16,
    **kwargs: Any,
) -> SwiftEngine:
    """An engine for a model type of `MODEL_MAPPING`, or for the folder, file or hub's id `model_id_or_path`.

    `torch_dtype` is a torch.dtype or its name; None lets the model choose. `engine_kwargs` may hold any field of
    `octavo.config.EngineOptions`. `model_dir` is an older name of `model_id_or_path`. Raises `ConfigError`,
    `DownloadError`, `CheckpointError` or `CapacityError`.
    """
    model_id_or_path = kwargs.pop("model_dir", None) or model_id_or_path
    for name in kwargs:
        known = {*get_vllm_engine.__annotations__, "model_dir"} - {"return", "kwargs"}
        raise ConfigError(f"{name} is not an option of get_vllm_engine.{nearest(name, known)}")
    if use_async:
        raise ConfigError("use_async=True is not for these functions; use octavo.AsyncLLM, or leave it False")
    refuse_parallel(tensor_parallel_size, "tensor_parallel_size")
    if enable_lora:
        raise ConfigError("enable_lora is not supported yet; merge the adapter into the model and leave it False")
    extra = {
        "disable_custom_all_reduce": disable_custom_all_reduce,
        "enforce_eager": enforce_eager,
        "limit_mm_per_prompt": limit_mm_per_prompt,
    }
    if model_type is None and model_id_or_path is not None:
        model_type = guess_model_type(model_id_or_path)
    template_type = None if model_type is None else get_default_template_type(model_type)
    options = engine_options(
        {**extra, **(engine_kwargs or {})},
        dtype=dtype_name(torch_dtype),
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    options.model = locate(model_type, model_id_or_path, revision)
    engine = SwiftEngine(LLM.from_options(options), model_type, template_type)
    warn_of_idle_cards(engine.model_config.device, tensor_parallel_size)
    return engine


def engine_options(given: Mapping[str, Any], **options: Any) -> EngineOptions:
    """Octavo's options out of vLLM's; what cannot be honoured is refused with the nearest name or the fix.

    The model is left to be set, so that a mistake here shows before anything is looked for or fetched.
    """
    for name, value in given.items():
        if name == "tensor_parallel_size":
            refuse_parallel(value, name)
    given = translated(given, ENGINE)
    known = {field.name for field in fields(EngineOptions)} - {"model"}
    for name in given.keys() - known - {"task_type"}:
        raise ConfigError(f"{name} is not an option of the engine.{nearest(name, {*known, *ENGINE})}")
    if given.get("task_type") not in (None, "causal_lm"):
        raise ConfigError(f"task_type is {given['task_type']!r}; Octavo answers causal_lm alone: leave it out")
    options |= {name: value for name, value in given.items() if name in known}
    return EngineOptions(**options)


class UnknownDtypeError(ConfigError, KeyError):
    """A type of numbers that no engine has; a `KeyError` for whoever came to expect one."""

    __str__ = Exception.__str__


def dtype_name(torch_dtype: Any) -> str:
    """Octavo's name for a torch.dtype, its name, or None."""
    name = None if torch_dtype is None else str(torch_dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownDtypeError(f"torch_dtype is {torch_dtype}; choose float16, bfloat16, float32 or None")
    return DTYPES[name]


def refuse_parallel(size: int, name: str) -> None:
    if size != 1:
        raise ConfigError(f"{name} is {size}, but one model on several cards is not supported yet; set it to 1")


def refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise ConfigError("lora_request is not supported yet; merge the adapter into the model and leave it out")


def warn_of_idle_cards(device: str, tensor_parallel_size: int) -> None:
    """One line if more cards are visible than the model will use."""
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    if len(cards) > tensor_parallel_size:
        used = f"the model runs on {tensor_parallel_size}" if device == "cuda" else f"the model runs on the {device}"
        logger.warning(
            "CUDA_VISIBLE_DEVICES=%s names %d cards, but %s; tensor_parallel_size is %d and decides over how many cards"
            " a model is spread",
            ",".join(cards),
            len(cards),
            used,
            tensor_parallel_size,
        )
