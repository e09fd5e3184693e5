"""How many bytes a model's weights take once they are loaded, from the table of its tensors alone. No torch."""

import re
from collections.abc import Mapping
from math import prod

from octavo.checkpoint import TensorInfo
from octavo.config import DTYPE_BYTES, ModelConfig
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


def weight_bytes(tensors: Mapping[str, TensorInfo], model: ModelConfig, dtype: str) -> int:
    """Bytes of all weights in `dtype`; the loader expands what is stored in fewer bits."""
    return num_weights(tensors, model) * DTYPE_BYTES[dtype]
