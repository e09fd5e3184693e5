"""How many bytes a model's weights take once they are loaded, from the table of its tensors alone. No torch."""

import re
from collections.abc import Mapping
from math import prod

from octavo.checkpoint import TensorInfo
from octavo.config import DTYPE_BYTES, ModelConfig, Precision
from octavo.kernels.weights import packed_bytes
from octavo.models import family_of

# Buffers that older exports stored beside the weights; what they hold follows from the configuration.
NOT_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def unused_tensors(model: ModelConfig) -> set[str]:
    """Names of tensors that a checkpoint may hold and the model has no use for."""
    return {f"{family_of(model.architecture).names['lm_head']}.weight"} if model.tie_word_embeddings else set()


def num_weights(tensors: Mapping[str, TensorInfo], model: ModelConfig) -> int:
    """Elements of all weights; where there are no tensors (dummy weights) the configuration's shape is counted."""
    unused = unused_tensors(model)
    taken = [info for name, info in tensors.items() if name not in unused and not NOT_WEIGHTS.search(name)]
    return sum(prod(info.shape) for info in taken) or model.num_parameters()


def weight_bytes(
    tensors: Mapping[str, TensorInfo], model: ModelConfig, dtype: str, precision: Precision = "plain"
) -> int:
    """Bytes of all weights as `EngineConfig.dtype` and `weights` have them.

    Plain tensors are of `dtype`, whatever they were stored in; in fp8 the layers' matrices have a byte a weight and an
    fp32 scale an output. Packed ones are as `kernels.weights` says; norms and
    biases are fp32 beside them, and the embedding's rows stay in the mapped file.
    """
    if precision == "plain":
        return num_weights(tensors, model) * DTYPE_BYTES[dtype]
    names = family_of(model.architecture).names
    if precision == "fp8":
        kept = {f"{names['embedding']}.weight", f"{names['lm_head']}.weight"}
        matrices = [info.shape for name, info in tensors.items() if len(info.shape) == 2 and name not in kept]
        elements = sum(map(prod, matrices)) or model.matrix_parameters()
        outputs = sum(shape[0] for shape in matrices) or model.matrix_outputs()
        others = num_weights(tensors, model) - elements
        return elements + 4 * outputs + others * DTYPE_BYTES[dtype]
    unused = unused_tensors(model)
    if not model.tie_word_embeddings:
        unused.add(f"{names['embedding']}.weight")
    taken = {name: info for name, info in tensors.items() if name not in unused and not NOT_WEIGHTS.search(name)}
    if not taken:
        per_weight = packed_bytes("BF16", 16, 32, precision) / (16 * 32)
        return int(model.num_parameters() * per_weight)
    return sum(
        packed_bytes(info.dtype, *info.shape, precision) if len(info.shape) == 2 else 4 * prod(info.shape)
        for info in taken.values()
    )


def stored_types(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Types of the matrices that a checkpoint holds."""
    return {info.dtype for info in tensors.values() if len(info.shape) == 2}
