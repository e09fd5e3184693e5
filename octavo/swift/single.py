"""One chat at a time, as ms-swift 2.x does it around transformers: `get_model_tokenizer`, `inference`,
`inference_stream`.

Octavo's engine stands in for the model, so `model.generation_config` is a `VllmGenerationConfig`.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from octavo.errors import ConfigError, nearest
from octavo.swift.engine import SwiftEngine, get_vllm_engine
from octavo.swift.generation_config import VllmGenerationConfig
from octavo.swift.models import locate
from octavo.swift.request_list import inference_stream_vllm, inference_vllm
from octavo.swift.template import Template
from octavo.swift.tokenizer import HfTokenizer
from octavo.text.tokenizer import Tokenizer

History = list[Any]


def get_model_tokenizer(
    model_type: str,
    torch_dtype: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    load_model: bool = True,
    *,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    quant_method: None = None,
    **kwargs: Any,
) -> tuple[SwiftEngine | None, HfTokenizer]:
    """An engine and its tokenizer; with `load_model=False` None and the tokenizer.

    `model_kwargs` may hold `device_map="auto"`; `kwargs` are options of `get_vllm_engine`. As in transformers, answers
    are sampled only if generation_config.json says `do_sample`, and are as long as the context unless it gives
    `max_new_tokens`. Raises what `get_vllm_engine` raises.
    """
    if quant_method is not None:
        raise ConfigError(f"quant_method is {quant_method!r}; use a model whose weights are quantized already")
    for name, value in (model_kwargs or {}).items():
        if name != "device_map" or value not in (None, "auto"):
            raise ConfigError(f"model_kwargs holds {name}={value!r}; only device_map='auto' is understood")
    if not load_model:
        path = locate(model_type, kwargs.pop("model_dir", None) or model_id_or_path, revision)
        for name in kwargs:
            raise ConfigError(f"{name} is an option of the model, but load_model is False; leave it out")
        return None, HfTokenizer(Tokenizer.load(path), name_or_path=path)
    engine = get_vllm_engine(model_type, torch_dtype, model_id_or_path=model_id_or_path, revision=revision, **kwargs)
    config, given = engine.generation_config, engine.llm.generation_config
    # A temperature below 1 beside a missing do_sample is a slip of the file's, and sampling is meant.
    config.do_sample = bool(given.get("do_sample")) or 0 < config.temperature < 1
    if given.get("max_new_tokens") is None:
        config.max_tokens = None
    return engine, engine.hf_tokenizer


def inference(
    model: SwiftEngine,
    template: Template,
    query: str,
    history: Sequence[Any] | None = None,
    system: str | None = None,
    images: None = None,
    *,
    generation_config: VllmGenerationConfig | None = None,
    stop_words: Sequence[str] | None = None,
    generation_info: dict[str, Any] | None = None,
    stream: bool = False,
    verbose: bool = False,
    prompt_prefix: str = "[PROMPT]",
    output_prefix: str = "[OUTPUT]",
    **kwargs: Any,
) -> tuple[str, History]:
    """(answer, history with query and answer). `verbose` prints both, with `stream` too the answer as it grows."""
    request = _request(query, history, system, images, kwargs)
    config = _config(model, generation_config, stop_words)
    if not (stream and verbose):
        (response,) = inference_vllm(
            model,
            template,
            [request],
            generation_config=config,
            generation_info=generation_info,
            verbose=verbose,
            prompt_prefix=prompt_prefix,
            output_prefix=output_prefix,
        )
        return response["response"], response["history"]
    print(f"{prompt_prefix}{query}{output_prefix}", end="")
    last: tuple[str, History] = ("", list(history or ()))
    shown = 0
    for last in _stream(model, template, request, config, generation_info):
        print(last[0][shown:], end="", flush=True)
        shown = len(last[0])
    print()
    return last


def inference_stream(
    model: SwiftEngine,
    template: Template,
    query: str,
    history: Sequence[Any] | None = None,
    system: str | None = None,
    images: None = None,
    *,
    generation_config: VllmGenerationConfig | None = None,
    stop_words: Sequence[str] | None = None,
    generation_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[tuple[str, History]]:
    """(answer so far, history with it) again and again; the answer only grows."""
    request = _request(query, history, system, images, kwargs)
    yield from _stream(model, template, request, _config(model, generation_config, stop_words), generation_info)


def _stream(
    model: SwiftEngine,
    template: Template,
    request: dict[str, Any],
    config: VllmGenerationConfig,
    info: dict[str, Any] | None,
) -> Iterator[tuple[str, History]]:
    for responses in inference_stream_vllm(model, template, [request], generation_config=config, generation_info=info):
        response = responses[0]
        assert response is not None, "one request reports at every step"
        yield response["response"], response["history"]


def _request(
    query: str, history: Sequence[Any] | None, system: str | None, images: None, others: Mapping[str, Any]
) -> dict[str, Any]:
    known = {"tools", "truncation_strategy", *inference.__annotations__} - {"kwargs", "return"}
    for name in others:
        if name != "tools":
            raise ConfigError(f"{name} is not an option of inference.{nearest(name, known)}")
    return {"query": query, "history": list(history or ()), "system": system, "images": images, **others}


def _config(
    model: SwiftEngine, given: VllmGenerationConfig | None, stop_words: Sequence[str] | None
) -> VllmGenerationConfig:
    config = deepcopy(model.generation_config if given is None else given)
    config.stop = [*config.stop, *(stop_words or ())]
    return config
