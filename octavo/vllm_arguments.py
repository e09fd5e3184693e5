"""Arguments of vLLM's `LLM(...)` and `vllm serve` that Octavo does not have, with the values that change nothing here.

Commands and programs that were written for vLLM carry over, and what could matter is refused with what to do. Source:
vLLM's documentation, "Engine Arguments" and "vllm serve", versions 0.8 to 0.32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError, short


@dataclass(frozen=True, slots=True)
class Argument:
    """`harmless` are the values that change nothing here, all if it is None; `fix` says what to do for others."""

    harmless: tuple[Any, ...] | None = None
    fix: str = ""
    is_switch: bool = False  # whether the command line writes it without a value


ANY = Argument()
_ONE_DEVICE = Argument((1, None), "a model runs on one device as yet")
_NO_ADAPTERS = "merge the adapter into the model's weights"
_TEXT_ALONE = "Octavo takes text alone"
_QUANTIZED = "quantized files are read as they are, and quantize brings others to a precision"


_SECRET = ("hf_token",)  # is not printed


def _switches(*names: str) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument(is_switch=True))


def _off(fix: str, *names: str) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument((False, None), fix, is_switch=True))


def _unset(fix: str, *names: str, also: tuple[Any, ...] = ()) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument((None, *also), fix))


# Of `LLM(...)` and of `vllm serve`.
ENGINE: dict[str, Argument] = {
    # How vLLM computes, logs or warms up; no answer depends on it.
    **_switches("disable_log_stats", "disable_custom_all_reduce", "enforce_eager", "trust_remote_code"),
    **_switches("use_tqdm_on_load", "disable_cascade_attn", "async_scheduling", "ray_workers_use_nsight"),
    **_switches("disable_async_output_proc", "use_v2_block_manager", "enable_prompt_adapter", "skip_mm_profiling"),
    **_switches("disable_hybrid_kv_cache_manager", "enable_logging_iteration_details", "fail_on_environ_validation"),
    **_switches("aggregate_engine_logging", "enable_layerwise_nvtx_tracing"),
    "max_seq_len_to_capture": Argument(None),
    "max_context_len_to_capture": Argument(None),
    "max_parallel_loading_workers": Argument(None),
    "compilation_config": Argument(None),
    "cuda_graph_sizes": Argument(None),
    "num_gpu_blocks_override": Argument((None,), "set kv_cache_memory"),
    "num_lookahead_slots": Argument((0, None), "there is no speculative decoding as yet"),
    "long_prefill_token_threshold": Argument((0, None), "set max_num_batched_tokens"),
    "max_num_partial_prefills": Argument((1, None), "as many prompts are computed at once as a step has room for"),
    "max_long_partial_prefills": Argument((1, None), "as many prompts are computed at once as a step has room for"),
    "enable_chunked_prefill": Argument((True, None), "prompts go in chunks; set max_num_batched_tokens", True),
    "scheduling_policy": Argument(("fcfs", "priority", None), "a request's priority always counts; see fair_share"),
    "max_logprobs": Argument((20, None), "a request may ask for up to 100"),
    "logprobs_mode": Argument(("raw_logprobs", None), "log probabilities are those before temperature and filters"),
    # One device.
    "tensor_parallel_size": _ONE_DEVICE,
    "pipeline_parallel_size": _ONE_DEVICE,
    "data_parallel_size": _ONE_DEVICE,
    "decode_context_parallel_size": _ONE_DEVICE,
    **_off("a model runs on one device as yet", "enable_expert_parallel", "enable_eplb", "enable_dbo"),
    **_unset(
        "a model runs on one device as yet", "distributed_executor_backend", "worker_cls", also=("mp", "uni", "auto")
    ),
    # Files.
    "tokenizer_mode": Argument(("auto", "slow", None), "the model's own tokenizer is read; see the option tokenizer"),
    "skip_tokenizer_init": Argument((False, None), "prompts may be token ids all the same", True),
    "config_format": Argument(("auto", "hf", None), "config.json is read, or a GGUF file"),
    "model_impl": Argument(("auto", "vllm", None), "each architecture is Octavo's own"),
    "runner": Argument(("auto", "generate", None), "Octavo generates text"),
    "task": Argument(("auto", "generate", None), "Octavo generates text"),
    "convert": Argument(("auto", "none", None), "Octavo generates text"),
    **_unset("the option revision holds for all of a model's files", "code_revision", "tokenizer_revision"),
    **_unset("set HF_HOME, or MODELSCOPE_CACHE, or OCTAVO_HOME", "download_dir"),
    **_unset("log in with the hub's own tool, or set HF_TOKEN", "hf_token"),
    **_unset("edit the model's config.json", "hf_overrides", "override_generation_config", also=({},)),
    **_unset("edit the model's config.json", "rope_scaling", "rope_theta", "hf_config_path", also=({},)),
    **_unset("name the model's folder", "model_loader_extra_config", also=({},)),
    **_unset(_QUANTIZED, "quantization"),
    **_unset("Octavo has no such memory", "cpu_offload_gb", also=(0, 0.0)),
    **_off("the KV cache has the scales that it needs", "calculate_kv_scales"),
    # Not here, or not yet.
    **_unset(
        "this is not here yet",
        "speculative_config",
        "speculative_model",
        "kv_transfer_config",
        "guided_decoding_backend",
    ),
    **_unset(
        "this is not here yet", "reasoning_parser", "structured_outputs_config", "additional_config", also=({}, "")
    ),
    **_unset("Octavo has its own", "logits_processor_pattern", "logits_processors", "worker_extension_cls", also=([],)),
    **_off(_NO_ADAPTERS, "enable_lora", "enable_lora_bias", "fully_sharded_loras"),
    **_unset(_NO_ADAPTERS, "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype", also=(1, 16, "auto")),
    **_off("this is not here yet", "enable_sleep_mode", "enable_prompt_embeds", "enable_return_routed_experts"),
    **_switches("disable_mm_preprocessor_cache", "interleave_mm_strings"),
    **_unset(_TEXT_ALONE, "limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", also=({},)),
    **_unset(_TEXT_ALONE, "allowed_local_media_path", "allowed_media_domains", also=("", [])),
}
# Of `vllm serve` alone.
SERVER: dict[str, Argument] = {
    **_switches("disable_log_requests", "disable_uvicorn_access_log", "disable_frontend_multiprocessing"),
    **_switches("enable_log_requests"),  # see _NAMES
    **_switches("enable_request_id_headers", "enable_prompt_tokens_details", "enable_offline_docs"),
    **_off("a proxy in front may hide /openapi.json, which tells nothing secret", "disable_fastapi_docs"),
    **_off("see /metrics", "enable_server_load_tracking"),
    **_off("start the server anew once the certificate was renewed", "enable_ssl_refresh"),
    "uvicorn_log_level": Argument(("info", "warning", "error", "critical", None), "see --verbose and --log-format"),
    "max_log_len": Argument(None),
    "api_server_count": _ONE_DEVICE,
    "response_role": Argument(("assistant", None), "answers are the assistant's"),
    "chat_template_content_format": Argument(("auto", "string", None), "templates get the content as a text"),
    "ssl_cert_reqs": Argument((0, None), "clients prove themselves by an API key"),
    **_unset("clients prove themselves by an API key", "ssl_ca_certs"),
    **_unset("requests may hold chat_template_kwargs", "default_chat_template_kwargs", also=({},)),
    **_unset("write it into the model's folder, as chat_template.jinja", "chat_template"),
    **_unset(_NO_ADAPTERS, "lora_modules", "prompt_adapters", also=([],)),
    **_unset("put a proxy in front", "middleware", also=([],)),
    **_unset("see --log-format", "log_config_file"),
    **_off("tools are not here yet", "enable_auto_tool_choice"),
    **_unset("tools are not here yet", "tool_call_parser", "tool_parser_plugin", "tool_server", also=("",)),
    **_off("pages get no credentials", "allow_credentials"),
    **_off("a request asks for it by stream_options", "enable_force_include_usage"),
    **_off("a token is told by its text", "return_tokens_as_token_ids"),
    **_off("engines are started by this command alone", "headless"),
}
# Names that vLLM spells another way.
_NAMES = {"enable_log_requests": "log_requests"}
# Names that Octavo has, with values that vLLM spells another way.
_SPELLINGS: Mapping[str, Mapping[Any, Any]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "load_format": {"safetensors": "auto", "hf": "auto", "gguf": "auto"},
    "generation_config": {"vllm": "none"},
    "enable_prefix_caching": {None: True},
}


def translated(given: Mapping[str, Any], known: Mapping[str, Argument]) -> dict[str, Any]:
    """`given` without the arguments of `known` that change nothing here, and with Octavo's spellings of values.

    Raises `ConfigError` for one of `known` that would.
    """
    options = {}
    for name, value in given.items():
        value = spelled(name, value)
        argument = known.get(name)
        if argument is None or name in _NAMES:
            options[_NAMES.get(name, name)] = value
        elif argument.harmless is not None and not _among(value, argument.harmless):
            said = "given" if name in _SECRET else short(value)
            raise ConfigError(f"{name} is {said}, which Octavo does not support: {argument.fix}; leave it out")
    return options


def spelled(name: str, value: Any) -> Any:
    """`value` of an option as Octavo spells it."""
    spellings = _SPELLINGS.get(name, {})
    return spellings.get(value, value) if isinstance(value, str | bool | None) else value


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value == known and (type(value) is type(known) or type(value) in (int, float)) for known in values)
