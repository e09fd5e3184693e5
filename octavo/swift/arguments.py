"""`InferArguments` and `DeployArguments`: ms-swift's flags as dataclasses, from which the command lines are made.

What Octavo cannot honour is refused by name; nothing is ignored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from octavo.config import EngineOptions, ServerOptions, option, parse_size, words
from octavo.errors import ConfigError
from octavo.swift.models import get_default_template_type, guess_model_type, locate, model_info

Backend = Literal["AUTO", "vllm", "pt", "lmdeploy", "transformers", "sglang"]
# Flags that have an effect elsewhere but none here, with the values at which they ask for none.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "sft_type": (("full",), "merge the adapter into the model, then leave it out"),
    "load_dataset_config": ((False,), "name files with --val_dataset"),
    "dataset": (([],), "name JSON-lines files with --val_dataset"),
    "quant_method": ((None,), "use a model whose weights are quantized already"),
    "quantization_bit": ((0,), "use a model whose weights are quantized already"),
    "rope_scaling": ((None,), "the model's own scaling is used"),
    "merge_lora": ((False,), "merge the adapter elsewhere"),
    "limit_mm_per_prompt": ((None, "", "{}"), "Octavo takes text only"),
    "vllm_enable_lora": ((False,), "merge the adapter into the model"),
    "vllm_max_lora_rank": ((16,), "merge the adapter into the model"),
    "lora_modules": (([],), "merge the adapter into the model"),
    "tensor_parallel_size": ((1,), "one model on several cards is not supported yet"),
    "tp": ((1,), "one model on several cards is not supported yet"),
    "quant_policy": ((0,), "the KV cache is kept in the model's type"),
    "cache_max_entry_count": ((0.8,), "set --gpu_memory_utilization or --kv_cache_memory"),
    "max_logprobs": ((20,), "a request may ask for up to 100"),
    "log_interval": ((10,), "/metrics has the figures at any time"),
    "hub_token": ((None,), "models are looked up on this machine only"),
}
_DTYPES = {"AUTO": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse_switch(text: str) -> bool:
    """`true` or `false`, in the spellings that transformers' parser takes."""
    known = dict.fromkeys(("true", "yes", "y", "t", "1"), True) | dict.fromkeys(("false", "no", "n", "f", "0"), False)
    if text.lower() not in known:
        raise ConfigError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def switch(default: bool, help: str) -> Any:
    return option(default, help, parse=parse_switch)


@dataclass(slots=True)
class InferArguments:
    """What `octavo infer` takes. None lets the model, or Octavo, choose."""

    model_type: str | None = option(None, "model type, such as qwen-7b-chat")
    model_id_or_path: str | None = option(None, "a hub's id, a folder or a .gguf file", also=["--model"])
    model_revision: str | None = option(None, "revision in the hub's cache")
    sft_type: str = option("full", "how the checkpoint was made; full is what can be read")
    template_type: str = option("AUTO", "chat template; AUTO takes the model type's")
    infer_backend: Backend = option("AUTO", "any name: Octavo is the backend")
    ckpt_dir: str | None = option(None, "folder of a trained checkpoint, in place of the model's own files")
    result_dir: str | None = option(None, "where answers are kept (default: infer_result in the model's folder)")
    load_args_from_ckpt_dir: bool = switch(True, "read model and template type from ckpt_dir/sft_args.json")
    load_dataset_config: bool = switch(False, "take the data set from the checkpoint")
    eval_human: bool | None = option(None, "ask in the terminal even if a data set is given", parse=parse_switch)
    seed: int = option(42, "seed of the answers")
    dtype: Literal["AUTO", "bf16", "fp16", "fp32"] = option("AUTO", "type of weights and activations")
    dataset: list[str] = words("data sets by name")
    val_dataset: list[str] = words("JSON-lines files to answer: query, and perhaps system, history, response")
    show_dataset_sample: int = option(-1, "answer so many lines only; -1 for all")
    save_result: bool = switch(True, "keep answers in a file")
    system: str | None = option(None, "system prompt (default: the template's)")
    tools_prompt: str | None = option(None, "how tools are described: react_en or react_zh")
    max_length: int = option(-1, "longest prompt in tokens; -1 for no limit")
    truncation_strategy: Literal["delete", "truncation_left"] = option("delete", "what becomes of longer prompts")
    quant_method: str | None = option(None, "quantize while loading")
    quantization_bit: int = option(0, "quantize while loading")
    max_new_tokens: int = option(2048, "longest answer in tokens")
    do_sample: bool | None = option(None, "false always takes the likeliest token", parse=parse_switch)
    temperature: float | None = option(None, "0 always takes the likeliest token (default: the model's)")
    top_k: int | None = option(None, "draw from so many likeliest tokens (default: the model's)")
    top_p: float | None = option(None, "draw from the tokens that hold this share (default: the model's)")
    repetition_penalty: float | None = option(None, "above 1 discourages repetition (default: the model's)")
    num_beams: int = option(1, "above 1 searches with so many beams, and draws nothing")
    stop_words: list[str] = words("texts that end an answer")
    rope_scaling: str | None = option(None, "stretch the context")
    stream: bool = switch(True, "show answers as they grow")
    merge_lora: bool = switch(False, "merge an adapter first")
    verbose: bool = switch(False, "say more while working")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's whole memory to fill, with what others hold")
    tensor_parallel_size: int = option(1, "cards that one model is spread over")
    max_num_seqs: int = option(256, "most sequences in one step")
    max_model_len: int | None = option(None, "longest context (prompt and answer) in tokens")
    disable_custom_all_reduce: bool = switch(True, "has no effect: one card runs a model")
    enforce_eager: bool = switch(False, "has no effect: steps always run as they come")
    limit_mm_per_prompt: str | None = option(None, "images in a prompt")
    vllm_enable_lora: bool = switch(False, "answer with adapters")
    vllm_max_lora_rank: int = option(16, "largest rank of an adapter")
    lora_modules: list[str] = words("adapters as name=path")
    max_logprobs: int = option(20, "most logprobs that a request may ask for")
    tp: int = option(1, "tensor_parallel_size by another name")
    cache_max_entry_count: float = option(0.8, "share of the memory for the KV cache, lmdeploy's way")
    quant_policy: int = option(0, "quantize the KV cache")
    hub: Literal["auto", "hf", "modelscope"] = option(
        "auto", "where a model's id is; auto: what is here already, else ModelScope, or Hugging Face with USE_HF=1"
    )
    hub_token: str | None = option(None, "token for a hub")
    kv_cache_memory: int | None = option(
        None, "memory for the KV cache, such as 2GiB", metavar="SIZE", parse=parse_size
    )
    # Options that ms-swift does not have, by their names in EngineOptions and ServerOptions.
    own: dict[str, Any] = field(default_factory=dict, metadata={"help": ""})

    def __post_init__(self) -> None:
        self._refuse()
        self._read_checkpoint()
        if self.model_type is None and self.ckpt_dir is None and self.model_id_or_path is None:
            raise ConfigError("no model is named; give --model_type, such as qwen-7b-chat, or --model_id_or_path")
        if self.model_type is not None:
            model_info(self.model_type)

    def _refuse(self) -> None:
        for name, (harmless, fix) in _REFUSED.items():
            value = getattr(self, name, harmless[0])
            if value not in harmless:
                raise ConfigError(f"--{name} {value} is not supported ({fix}); leave it out")
        if self.load_args_from_ckpt_dir is False and self.ckpt_dir is not None and self.model_type is None:
            raise ConfigError("with --load_args_from_ckpt_dir false, name the --model_type too")

    def _read_checkpoint(self) -> None:
        """Model and template type of a trained checkpoint, where they are not given."""
        source = Path(self.ckpt_dir or "") / "sft_args.json"
        if self.ckpt_dir is None or not self.load_args_from_ckpt_dir or not source.is_file():
            return
        import json

        try:
            saved = json.loads(source.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{source} is not JSON ({error}); give --load_args_from_ckpt_dir false") from None
        if saved.get("sft_type", "full") != "full":
            raise ConfigError(f"{self.ckpt_dir} holds a {saved['sft_type']} adapter; merge it into the model first")
        self.model_type = self.model_type or saved.get("model_type")
        if self.template_type == "AUTO":
            self.template_type = saved.get("template_type") or "AUTO"

    # ---- what follows from them ---------------------------------------------------------------------------

    @property
    def torch_dtype(self) -> str | None:
        """The type of weights by its name in torch; None to let the model choose."""
        return None if self.dtype == "AUTO" else _DTYPES[self.dtype]

    def resolved_model_type(self) -> str | None:
        return self.model_type or guess_model_type(self.ckpt_dir or self.model_id_or_path or "")

    def resolved_template_type(self) -> str | None:
        """The template's name; None if neither a flag nor the model type tells it."""
        model_type = self.resolved_model_type()
        if self.template_type != "AUTO":
            return self.template_type
        return None if model_type is None else get_default_template_type(model_type)

    def engine_options(self) -> EngineOptions:
        """The engine that these flags ask for, and `own_options`; raises `DownloadError` if there is no such model."""
        use_hf = {"hf": True, "modelscope": False}.get(self.hub)
        name = self.ckpt_dir or self.model_id_or_path
        options = EngineOptions(
            model=locate(self.model_type, name, self.model_revision, use_hf=use_hf),
            dtype=_DTYPES[self.dtype],  # type: ignore[arg-type]
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_seqs=self.max_num_seqs,
            kv_cache_memory=self.kv_cache_memory,
            seed=self.seed,
        )
        return replace(options, **{name: self.own[name] for name in own_engine_options(type(self)) if name in self.own})

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that flags set; `do_sample` false is temperature 0."""
        values: Mapping[str, Any] = asdict(self)
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: values[name] for name in names if values[name] is not None}
        return given | ({"temperature": 0.0} if self.do_sample is False else {})


@dataclass(slots=True)
class DeployArguments(InferArguments):
    """What `octavo deploy` takes."""

    host: str = option("0.0.0.0", "address to listen on")
    port: int = option(8000, "port to listen on")
    api_key: str | None = option(None, "clients must send this key (Authorization: Bearer KEY)")
    ssl_keyfile: str | None = option(None, "key for TLS")
    ssl_certfile: str | None = option(None, "certificate for TLS")
    owned_by: str = option("swift", "owner in the model list")
    served_model_name: str | None = option(None, "name that clients use (default: the model type)")
    verbose: bool = switch(False, "say more while working")
    log_interval: int = option(10, "seconds between lines of statistics")

    def _refuse(self) -> None:
        InferArguments._refuse(self)
        if self.num_beams != 1:
            raise ConfigError(f"--num_beams {self.num_beams} is for infer: a server's clients ask for it; leave it out")

    def server_options(self) -> ServerOptions:
        name = self.served_model_name or self.resolved_model_type()
        options = ServerOptions(
            host=self.host,
            port=self.port,
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
            served_model_name=[] if name is None else [name],
            api_key=[] if self.api_key is None else [self.api_key],
        )
        return replace(options, **{name: self.own[name] for name in own_server_options() if name in self.own})


def own_engine_options(kind: type[InferArguments]) -> list[str]:
    """Names of the engine's options that a command takes beside ms-swift's."""
    theirs = {entry.name for entry in fields(kind)} | {"model", "revision"}
    if not issubclass(kind, DeployArguments):
        theirs.add("generation_config")  # the answers' own flags say all of that
    return [entry.name for entry in fields(EngineOptions) if entry.name not in theirs]


def own_server_options() -> list[str]:
    """Names of the server's options that `deploy` takes beside ms-swift's."""
    theirs = {entry.name for entry in fields(DeployArguments)}
    return [entry.name for entry in fields(ServerOptions) if entry.name not in theirs]
