"""What a model is (`ModelConfig`), what a user may ask for (`EngineOptions`) and what runs (`EngineConfig`).

An option is written once, as a dataclass field with its default and its help; the command line, its `--help` and the
documentation are generated from these fields. `EngineOptions` may hold `None` for "choose for me"; the resolved,
frozen `EngineConfig` holds no such thing. Nothing here loads torch or touches a device.
"""

import math
import operator
import os
import re
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from octavo.errors import ConfigError, nearest

DEFAULT_MODEL = "smollm2:135m"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "fp8": 1, "int8": 1}
SCALE_BYTES = 4  # what an int8 cache has for each token and kv head, in K and in V, behind its elements

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantize = Literal["int8", "int4", "fp8"]
KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"]
# Matrices as plain tensors of the model's dtype, in fp8 for a GPU, or packed for the CPU's kernels: in one precision,
# or as stored.
Precision = Literal["plain", "fp8", "stored", "float32", "bfloat16", "int8", "int4"]
WarmUp = Literal["none", "quick", "full"]
PreemptionMode = Literal["auto", "recompute", "swap"]


def option(default: Any, help: str, **cli: Any) -> Any:
    """A dataclass field that is also a command-line option; `cli` holds what the flag adds (metavar, parse)."""
    return field(default=default, metadata={"help": help, **cli})


def words(help: str, metavar: str = "TEXT") -> Any:
    """An option that takes several texts, and none by default."""
    return field(default_factory=list, metadata={"help": help, "metavar": metavar})


def check_values(options: Any) -> None:
    """Raises `ConfigError` unless each field of the dataclass `options` holds one of its choices, a value of its type.

    So does the command line. Paths become texts, and numpy's whole numbers Python's.
    """
    hints = typing.get_type_hints(type(options))
    for option_field in fields(options):
        name, value = option_field.name, getattr(options, option_field.name)
        kinds = typing.get_args(hints[name]) if _is_union(hints[name]) else (hints[name],)
        if isinstance(value, os.PathLike) and str in kinds:
            setattr(options, name, os.fspath(value))
        elif hasattr(value, "__index__") and not isinstance(value, bool) and {int, float} & {*kinds}:
            setattr(options, name, operator.index(value))
        elif not any(_fits(kind, value) for kind in kinds):
            *others, last = [word for kind in kinds for word in _in_words(kind)]
            wanted = f"{', '.join(others)} or {last}" if others else last
            choices = [str(choice) for kind in kinds for choice in typing.get_args(kind)]
            near = nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(f"{name} is {value!r:.100}; it must be {wanted}{near and '.' + near}")


def check_memory(name: str, size: int) -> None:
    """Raises `ConfigError` for an amount of memory that can only be a number of larger units."""
    if 0 < size < _LEAST_MEMORY:
        raise ConfigError(f"{name} is {size}, which are bytes; write a unit, as in {size}GiB")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind or (kind is str and isinstance(value, str))


def _in_words(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [*typing.get_args(kind)]
    if typing.get_origin(kind) is list:
        return ["a list of texts"]
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return [names[kind]]


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_LEAST_MEMORY = 1024  # bytes
_UNITS |= {unit + "i": 1024 ** (power + 1) for power, unit in enumerate("kmgt")}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `2GiB`, `512M` or `1000000`; raises `ConfigError` on anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"size {text!r:.100} is not understood: write bytes or a unit, as in 2GiB or 512MB")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise ConfigError(f"size {text!r} is not understood: write bytes or a unit, as in 2GiB or 512MB")
    return int(float(found[1]) * _UNITS[found[2]])


def format_size(size: float) -> str:
    """`size` bytes for a person: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of a model.

    `scaling` names the rule for long contexts: `linear`, `llama3`, `yarn`, and `dynamic` and `qwen_ntk`, which stretch
    the base by an NTK factor that is chosen once per sequence from its prompt's length (see `ntk_alpha`), so that a
    cached key never depends on what came after it. `freq_factors`, if given, divide the frequencies one by one, as
    GGUF files have them. `rotary_dim` is the part of a head that rotates. Where `logn_length` is above 0, a query
    whose 1-based position p is beyond it is multiplied by ln(p) / ln(logn_length).
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    scaling: Literal["none", "linear", "llama3", "yarn", "dynamic", "qwen_ntk"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()
    logn_length: int = 0

    def ntk_alpha(self, prompt_len: int) -> float:
        """Factor on the base for a sequence whose prompt has `prompt_len` tokens; 1.0 where the rule asks for none."""
        if self.scaling not in ("dynamic", "qwen_ntk") or prompt_len <= self.original_max_position:
            return 1.0
        ratio = prompt_len / self.original_max_position
        if self.scaling == "qwen_ntk":
            # In steps: 3 up to twice the trained length, 7 up to four times, 15 up to eight times.
            return 2.0 ** math.ceil(math.log2(ratio) + 1) - 1
        return self.factor * ratio - (self.factor - 1)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and arithmetic of a decoder, whatever file it came from.

    Widths in elements: `hidden_size` D, `num_heads` N query heads of `head_dim` H on `num_kv_heads` K, MLP width
    `intermediate_size`, `vocab_size` V. `max_position` is the longest context the model was made for, in tokens.
    `num_tokens` of the V rows stand for a token (0: all), and what lies above is never drawn. `windows` holds for each
    layer how many of the last keys a query sees, 0 for all; empty if that is so in every layer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    num_tokens: int = 0
    windows: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def num_parameters(self) -> int:
        """Weights in elements, biases and norms among them; a tied head counts once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        width, mlp = self.hidden_size, self.intermediate_size
        layer = self._layer_matrices() + 2 * width
        layer += self.qkv_bias * (q + 2 * kv) + self.o_bias * width + self.mlp_bias * (2 * mlp + width)
        layer += self.qk_norm * 2 * self.head_dim
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * width + width

    def _layer_matrices(self) -> int:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    def matrix_parameters(self) -> int:
        """Of the weights, those in matrices of layers: neither embedding and head nor biases and norms."""
        return self.num_layers * self._layer_matrices()

    def matrix_outputs(self) -> int:
        """Rows of all these matrices together."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.num_layers * (q + 2 * kv + 2 * self.hidden_size + 2 * self.intermediate_size)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V that one token keeps in the cache, over all layers."""
        head = self.head_dim * KV_DTYPE_BYTES[dtype] + (SCALE_BYTES if dtype == "int8" else 0)
        return 2 * self.num_layers * self.num_kv_heads * head


@dataclass(slots=True)
class EngineOptions:
    """What a user may choose about the engine. `None` (or `auto`) lets Octavo choose for model and machine."""

    model: str = option(
        DEFAULT_MODEL, "a known name, a GGUF file, a folder, or ORG/NAME of a hub", positional=True, metavar="MODEL"
    )
    hub: Literal["auto", "hf", "modelscope"] = option(
        "auto", "where ORG/NAME is; auto: what is here already, else Hugging Face, or ModelScope with USE_HF=0"
    )
    revision: str | None = option(None, "branch, tag or commit of the model on its hub")
    tokenizer: str | None = option(None, "folder or file to take the tokenizer from, if not from the model")
    dtype: Dtype = option("auto", "type of weights and KV cache; auto: 16 bits, or what a quantized file holds")
    kv_cache_dtype: KVCacheDtype = option(
        "auto", "type of the KV cache; auto: that of dtype; int8 on a CPU, fp8 on a GPU: half the memory of 16 bits"
    )
    device: Device = option("auto", "where to run; auto: a GPU if there is one")
    quantize: Quantize | None = option(
        None,
        "precision to bring the weights to: int8 or int4 on a CPU, where by default a quantized file keeps its own;"
        " fp8 on a GPU",
    )
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights of the model's real shape")
    max_model_len: int | None = option(
        None, "longest context, prompt and answer, in tokens (default: the model's, or what fits)"
    )
    block_size: int = option(16, "tokens in one block of the KV cache")
    kv_cache_memory: int | None = option(
        None,
        "memory for the KV cache, such as 2GiB (default: what is left of the share below)",
        metavar="SIZE",
        parse=parse_size,
    )
    gpu_memory_utilization: float = option(0.9, "share of the GPU's whole memory to fill, with what others hold")
    cpu_memory_utilization: float = option(0.5, "share of the free memory that weights and KV cache may take")
    max_num_seqs: int | None = option(None, "most sequences in one step (default: 64 on a CPU, 256 on a GPU)")
    max_num_batched_tokens: int | None = option(
        None, "most tokens in one step, longer prompts go in chunks (default: 512 on a CPU, 8192 on a GPU)"
    )
    enable_prefix_caching: bool = option(True, "share the KV blocks of equal prompt beginnings")
    prefix_cache_dir: str | None = option(
        None, "folder to keep the KV of prompts in, for after a restart (default: none)", metavar="FOLDER"
    )
    prefix_cache_size: int = option(
        10 * 1024**3, "most bytes in that folder, for all models together", metavar="SIZE", parse=parse_size
    )
    swap_space: int | None = option(
        None,
        "host memory for the KV of preempted requests; 0 for none (default: 0 on a CPU; 4GiB, or a quarter of the"
        " free RAM, on a GPU)",
        metavar="SIZE",
        parse=parse_size,
    )
    preemption_mode: PreemptionMode = option(
        "auto", "what a request that must give way does with its KV; auto: whatever costs less time"
    )
    fair_share: bool = option(
        False, "who was served least goes first: tenants are told apart by a request's user field, or its API key"
    )
    deterministic: bool = option(
        False,
        "a request's tokens and log probabilities are the same bits alone and in any company: on a GPU slower, on a"
        " CPU always so",
    )
    warm_up: WarmUp | None = option(
        None,
        "what a GPU prepares before requests come: the steps that come most often, or all, are recorded and compiled"
        " (default: quick in a server, none in LLM)",
    )
    generation_config: Literal["auto", "none"] = option(
        "auto", "sampling defaults: what the model's makers advise in generation_config.json, or none of it"
    )
    seed: int | None = option(None, "seed of the requests that bring none (default: another one in each run)")

    def __post_init__(self) -> None:
        if self.kv_cache_memory is not None:
            self.kv_cache_memory = parse_size(self.kv_cache_memory)
        self.prefix_cache_size = parse_size(self.prefix_cache_size)
        if self.swap_space is not None:
            self.swap_space = parse_size(self.swap_space)
        check_values(self)
        for name in ("kv_cache_memory", "prefix_cache_size", "swap_space"):
            check_memory(name, getattr(self, name) or 0)
        if self.prefix_cache_dir is not None and not self.enable_prefix_caching:
            raise ConfigError(
                "prefix_cache_dir is given, but enable_prefix_caching is off; leave out --prefix-cache-dir or"
                " --no-enable-prefix-caching"
            )
        if self.prefix_cache_dir is not None and self.load_format == "dummy":
            raise ConfigError("prefix_cache_dir is for a model's own weights; leave it out with --load-format dummy")
        if self.swap_space is not None and self.swap_space < 0:
            raise ConfigError(f"swap_space is {self.swap_space}; it must be at least 0")
        for name in (
            "max_model_len",
            "block_size",
            "kv_cache_memory",
            "prefix_cache_size",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("gpu_memory_utilization", "cpu_memory_utilization"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What runs: `EngineOptions` resolved against a model and a machine. Nothing in it is left to choose; what a user
    chooses and nothing settles is read from `options`."""

    model: ModelConfig
    options: EngineOptions
    dtype: str
    kv_dtype: str
    weights: Precision
    device: str
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seed: int
    num_host_blocks: int = 0  # blocks of the KV cache that host memory can keep for preempted requests
    warm_up: WarmUp = "none"

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks that one sequence of `max_model_len` tokens needs."""
        return math.ceil(self.max_model_len / self.block_size)


LISTS = ("served_model_name", "api_key", "allowed_origins", "allowed_hosts")  # of ServerOptions


@dataclass(slots=True)
class ServerOptions:
    """What a user may choose about the HTTP server."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "port to listen on")
    uds: str | None = option(None, "Unix socket to listen on, in place of host and port", metavar="PATH")
    root_path: str = option("", "path at which a proxy shows this server, such as /llm", metavar="PATH")
    ssl_certfile: str | None = option(None, "certificate for TLS, with its chain (PEM)", metavar="FILE")
    ssl_keyfile: str | None = option(None, "private key of the certificate (PEM)", metavar="FILE")
    served_model_name: list[str] = words(
        "names that clients use, of which answers tell the first; the model's own by default", "NAME"
    )
    api_key: list[str] = words(
        "clients must send one of these keys (Authorization: Bearer KEY); OCTAVO_API_KEY keeps it out of the process"
        " list",
        "KEY",
    )
    api_key_file: str | None = option(None, "file with a key on each line", metavar="FILE")
    isolate_prefix_cache: bool = option(
        False, "clients with different keys share no cached prefix, so that none learns what another has asked"
    )
    allowed_origins: list[str] = words(
        "origins whose pages a browser lets read answers, such as https://example.org; * for all", "ORIGIN"
    )
    allowed_hosts: list[str] = words(
        "names by which clients may reach this server; * for all (default: all, but on this machine alone and without"
        " a key only names of this machine)",
        "NAME",
    )
    max_queued_requests: int = option(1024, "waiting requests before new ones get 429")
    max_body_bytes: int = option(4 * 1024**2, "largest request body", metavar="SIZE", parse=parse_size)
    drain_seconds: float = option(30.0, "how long running requests may go on after SIGTERM")
    confirm_timeout: float = option(5.0, "seconds after which a request that the engine has not confirmed is refused")
    stall_timeout: float = option(120.0, "seconds of silence of an engine with work that make /health false")
    on_engine_death: Literal["restart", "exit"] = option("restart", "what to do when the engine process dies")
    log_requests: bool = option(False, "a log line for each request: id, status, tokens, times; no text of it")
    log_format: Literal["text", "json"] = option("text", "log lines as text, or each as a JSON object")

    def __post_init__(self) -> None:
        for name in LISTS:
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        self.max_body_bytes = parse_size(self.max_body_bytes)
        check_values(self)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with / and not end with one, as in /llm")
        if self.root_path == "/v1" or self.root_path.startswith("/v1/"):
            raise ConfigError("root_path is /v1, with which the server's own paths begin; take another")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|[A-Za-z0-9._-]+", name):
                raise ConfigError(f"allowed_hosts has {name!r}; give a name alone, as in llm.example.org, or * for all")
        if self.allowed_hosts and self.uds is not None:
            raise ConfigError("allowed_hosts is for host and port; leave it out with uds")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("TLS needs both ssl_certfile and ssl_keyfile; give both")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/A-Z]+", origin):
                raise ConfigError(
                    f"allowed_origins has {origin!r}; an origin is a scheme and a host in small letters, as in https://example.org"
                )
        for name in ("max_queued_requests", "max_body_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("drain_seconds", "confirm_timeout", "stall_timeout"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0")


def cache_home() -> Path:
    """Folder of downloaded models: `OCTAVO_HOME`, or `~/.cache/octavo`. Raises `ConfigError` as `user_cache` does."""
    named = os.environ.get("OCTAVO_HOME")
    return expanded(named) if named else user_cache("octavo", "OCTAVO_HOME")


def user_cache(name: str, variable: str) -> Path:
    """`~/.cache/NAME`; raises `ConfigError` for a user without a home, as in a container, that names the variable."""
    try:
        return Path.home() / ".cache" / name
    except RuntimeError:
        raise ConfigError(f"this user has no home folder for a cache; set {variable} to a folder") from None


def expanded(path: str | Path) -> Path:
    """`path` with `~` as the user's home, where that is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
