"""ms-swift's interface over Octavo's engine: `from octavo.swift import ...` in place of `from swift.llm import ...`.

Importing this is cheap; torch is loaded when an engine is made. The functions of 2.x (`get_vllm_engine`,
`inference_vllm`) and the engines of 3.x and 4.x (`VllmEngine`, `InferClient`) are both here.
"""

from importlib import import_module
from typing import Any

_NAMES_OF = {
    "models": ("MODEL_MAPPING", "ModelType", "get_default_template_type", "register_model"),
    "templates": ("TEMPLATE_MAPPING", "TemplateType", "get_template", "register_template"),
    "template": ("Template",),
    "tokenizer": ("HfTokenizer",),
    "generation_config": ("LmdeployGenerationConfig", "VllmGenerationConfig"),
    "engine": ("LoRARequest", "get_vllm_engine"),
    "request_list": ("add_vllm_request", "inference_stream_vllm", "inference_vllm"),
    "single": ("get_model_tokenizer", "inference", "inference_stream"),
    "arguments": ("DeployArguments", "InferArguments"),
    "commands": ("deploy_main", "infer_main", "prepare_vllm_engine_template"),
    "messages": ("history_to_messages", "messages_to_history"),
    "infer_engine": ("VllmEngine",),
    "protocol": (
        *("ChatCompletionResponse", "ChatCompletionStreamResponse", "InferRequest", "InferStats", "RequestConfig"),
        *("CompletionResponse", "CompletionStreamResponse", "ModelList", "UsageInfo"),
    ),
    "client": (
        *("InferClient", "get_model_list_client", "get_model_list_client_async"),
        *("inference_client", "inference_client_async"),
    ),
}
_HOME_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
# Other backends' names for the same thing: Octavo is the backend of all.
_ALIASES = {
    "get_lmdeploy_engine": "get_vllm_engine",
    "inference_lmdeploy": "inference_vllm",
    "inference_stream_lmdeploy": "inference_stream_vllm",
    "prepare_lmdeploy_engine_template": "prepare_vllm_engine_template",
    "XRequestConfig": "RequestConfig",
    "LmdeployEngine": "VllmEngine",
    "PtEngine": "VllmEngine",
    "SglangEngine": "VllmEngine",
    "TransformersEngine": "VllmEngine",
}

__all__ = sorted([*_HOME_OF, *_ALIASES])


def __getattr__(name: str) -> Any:
    target = _ALIASES.get(name, name)
    if target not in _HOME_OF:
        raise AttributeError(f"module 'octavo.swift' has no attribute {name!r}")
    return getattr(import_module(f"octavo.swift.{_HOME_OF[target]}"), target)


def __dir__() -> list[str]:
    return list(__all__)
