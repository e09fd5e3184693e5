"""In what precision a model runs, and whether on the CPU's kernels; if not, why, in words for a person."""

from octavo.config import EngineOptions, ModelConfig, Precision
from octavo.errors import ConfigError
from octavo.kernels import library
from octavo.memory import default_dtype

_MOST_HEADS_OF_A_GROUP = 64
_MOST_HEAD_WIDTH = 1024


def settle(
    options: EngineOptions, model: ModelConfig, stored: set[str], device: str, has_bfloat16: bool = True
) -> tuple[str, Precision, str | None]:
    """(dtype, `EngineConfig.weights`, why a CPU runs on plain torch instead of the kernels if it does).

    `stored` are the types of the checkpoint's matrices, empty where there are none. Raises `ConfigError` for a
    precision that cannot be had.
    """
    why = None
    if device == "cpu":
        why = why_not(model, options.dtype, options.block_size, stored)
        if why is None:
            return _on_kernels(options, stored)
    if options.quantize:
        raise ConfigError(
            f"quantize is {options.quantize}, but "
            + (f"the CPU's kernels cannot run here: {why}" if why else "it works on a CPU alone; leave it out")
        )
    dtype = default_dtype(model, device, has_bfloat16) if options.dtype == "auto" else options.dtype
    return dtype, "plain", why


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
