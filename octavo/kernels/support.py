"""In what precision a model runs, and whether on the CPU's kernels; if not, why, in words for a person."""

from importlib.util import find_spec

from octavo.config import EngineOptions, ModelConfig, Precision
from octavo.errors import ConfigError
from octavo.kernels import library
from octavo.memory import default_dtype

_MOST_HEADS_OF_A_GROUP = 64
_MOST_HEAD_WIDTH = 1024
# Compute capabilities from which on a GPU's matrix units know a type.
_BFLOAT16, _E4M3 = (8, 0), (8, 9)


def settle(
    options: EngineOptions,
    model: ModelConfig,
    stored: set[str],
    device: str,
    capability: tuple[int, int] = (9, 0),
) -> tuple[str, Precision, str | None]:
    """(dtype, `EngineConfig.weights`, why a CPU runs on plain torch instead of the kernels if it does).

    `stored` are the types of the checkpoint's matrices, empty where there are none, `capability` is a GPU's. Raises
    `ConfigError` for a precision that cannot be had.
    """
    if device == "cuda":
        return _on_gpu(options, model, capability)
    if options.quantize == "fp8":
        raise ConfigError("quantize is fp8, which is for a GPU; on a CPU use int8 or int4")
    why = why_not(model, options.dtype, options.block_size, stored)
    if why is None:
        return _on_kernels(options, stored)
    if options.quantize:
        raise ConfigError(f"quantize is {options.quantize}, but the CPU's kernels cannot run here: {why}")
    if options.kv_cache_dtype == "int8":
        raise ConfigError(f"kv_cache_dtype is int8 (leave it out), but the CPU's kernels cannot run here: {why}")
    if options.deterministic:
        raise ConfigError(
            f"deterministic is on, which plain torch cannot promise, and the CPU's kernels cannot run here: {why}"
        )
    return default_dtype(model, device, False) if options.dtype == "auto" else options.dtype, "plain", why


def _on_gpu(options: EngineOptions, model: ModelConfig, capability: tuple[int, int]) -> tuple[str, Precision, None]:
    has_bfloat16 = capability >= _BFLOAT16
    dtype = default_dtype(model, "cuda", has_bfloat16) if options.dtype == "auto" else options.dtype
    mine = ".".join(map(str, capability))
    if dtype == "bfloat16" and not has_bfloat16:
        raise ConfigError(f"dtype is bfloat16, which a GPU of compute capability {mine} does not have; use float16")
    for name in ("quantize", "kv_cache_dtype"):
        if getattr(options, name) == "fp8" and capability < _E4M3:
            raise ConfigError(
                f"{name} is fp8, which needs a GPU of compute capability {_E4M3[0]}.{_E4M3[1]} (Ada, Hopper) or newer,"
                f" and this one has {mine}; leave it out"
            )
    if options.kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype is int8, which works on a CPU alone; on a GPU use fp8")
    if options.deterministic and find_spec("triton") is None:
        raise ConfigError("deterministic is on, which on a GPU needs Triton; pip install triton, or leave it out")
    if options.quantize is None:
        return dtype, "plain", None
    if options.quantize != "fp8":
        raise ConfigError(f"quantize is {options.quantize}, which works on a CPU alone; on a GPU use fp8")
    return dtype, "fp8", None


def kv_dtype(options: EngineOptions, dtype: str, device: str) -> str:
    """`EngineConfig.kv_dtype` for a model of `dtype`; `ConfigError` for a type that the device cannot read."""
    wanted = options.kv_cache_dtype
    if wanted in ("auto", dtype):
        return dtype
    if device == "cpu" and wanted != "int8":
        raise ConfigError(
            f"kv_cache_dtype is {wanted}, but on a CPU the KV cache has dtype's, {dtype}, or int8;"
            " leave it out or use int8"
        )
    return wanted


def _on_kernels(options: EngineOptions, stored: set[str]) -> tuple[str, Precision, None]:
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    if options.quantize:
        return dtype, options.quantize, None
    if options.dtype == "auto" and stored - {"F32", "F16", "BF16"}:
        return dtype, "stored", None
    return dtype, "float32" if dtype == "float32" else "bfloat16", None


def why_not(model: ModelConfig, dtype: str, block_size: int, stored: set[str]) -> str | None:
    """Why a step of `model` cannot run in C++; None if it can.

    `dtype` is what the user asked for, `stored` the types of the checkpoint's matrices.
    """
    if library.load() is None:
        return "they were not built with this installation (a C++ compiler was missing, or the processor is unknown)"
    if dtype == "float16":
        return "dtype is float16, which they do not compute in; use bfloat16 or float32"
    if block_size % 16:
        return f"block_size is {block_size}, not a multiple of 16"
    widths = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "head_dim": model.head_dim,
    }
    for name, width in widths.items():
        if width % 16:
            return f"the model's {name} is {width}, not a multiple of 16"
    if model.num_heads // model.num_kv_heads > _MOST_HEADS_OF_A_GROUP or model.head_dim > _MOST_HEAD_WIDTH:
        return "the model's heads are too many for a kv head, or too wide"
    if unknown := stored - library.STORED.keys():
        return f"the model's weights are stored as {', '.join(sorted(unknown))}"
    return None
