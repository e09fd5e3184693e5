"""Which model families there are, and what a model's files mean: `read_model`, or config.json alone: `read_config`.

Architecture names map to families in one dictionary. A family's module says only what sets it apart and loads
no torch, so that a configuration can be read anywhere; decoders are built in `octavo.models.loader`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from octavo.checkpoint import Checkpoint, Description
from octavo.checkpoint.gguf import BLOCK_SIZES
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, ConfigError, nearest
from octavo.models.family import Family

FAMILIES: Mapping[str, str] = {
    "LlamaForCausalLM": "octavo.models.llama:Llama",
    "MistralForCausalLM": "octavo.models.llama:Mistral",
    "QWenLMHeadModel": "octavo.models.qwen:Qwen",
    "Qwen2ForCausalLM": "octavo.models.qwen2:Qwen2",
    "Qwen3ForCausalLM": "octavo.models.qwen3:Qwen3",
}


# Types of matrices that decoders take.
READABLE = BLOCK_SIZES.keys() - {"F64", "I8", "I16", "I32", "I64"}


def family_of(architecture: str) -> type[Family]:
    """The family of an architecture as config.json names it; `ConfigError` if there is none."""
    if architecture not in FAMILIES:
        raise ConfigError(
            f"architecture {architecture!r} is not supported.{nearest(architecture, FAMILIES)}"
            f" Supported: {', '.join(sorted(FAMILIES))}; a newer version may know it: pip install -U octavo"
        )
    module, name = FAMILIES[architecture].split(":")
    family: type[Family] = getattr(import_module(module), name)
    return family


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json alone; `ConfigError` names a field that is missing or wrong."""
    return _family(hf).config(hf)


def check_runnable(what: Description) -> None:
    """Raises `ConfigError` or `CheckpointError` for a model that cannot run, by what it says before it is fetched.

    The types of its matrices are looked at where it tells them.
    """
    read_config(what.config)
    types = {info.dtype for info in what.tensors.values() if len(info.shape) == 2} - READABLE
    if types:
        raise CheckpointError(
            f"the model's weights are stored as {', '.join(sorted(types))}, which Octavo does not read; take the"
            " original model in F32, F16 or BF16, or a GGUF file of it in Q8_0, Q4_0 to Q5_1 or Q2_K to Q6_K"
        )


def read_model(checkpoint: Checkpoint) -> ModelConfig:
    """The `ModelConfig` of a model's files together; raises `ConfigError` or `CheckpointError`."""
    return _family(checkpoint.config).of(checkpoint)


def _family(hf: Mapping[str, Any]) -> type[Family]:
    if quantized := hf.get("quantization_config") or hf.get("compression_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise ConfigError(
            "config.json: quantization_config says that the weights are quantized by"
            f" {method or quantized!r:.60}, which Octavo does not read; take the original model (quantize brings it to"
            " int8 or int4 on a CPU, to fp8 on a GPU), or a GGUF file of it"
        )
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise ConfigError(
            f"config.json: architectures is {architectures!r}; it must be a list with one of: "
            + ", ".join(sorted(FAMILIES))
        )
    return family_of(architectures[0])
