"""A model's code run on symbols: what a device that records or fuses ops must know before it trusts itself to."""

from typing import Any

import numpy as np

from octavo.batch import SENT, Ints
from octavo.layers.context import ForwardContext, LayerCache
from octavo.models.decoder import Decoder
from octavo.ops.symbol import TOKENS, NotRecordableError, Symbol
from octavo.ops.symbolic import SymbolicOps


def between_ops(model: Decoder, caches: list[LayerCache]) -> str:
    """What the model's code does with an op's result besides ops and views, in words; "" if there is nothing."""
    try:
        hidden_TD: Any = model.forward(two_tokens(model, caches, SymbolicOps()))
    except NotRecordableError as why:
        return str(why)
    assert isinstance(hidden_TD, Symbol), "the last of a model's ops gives the hidden states"
    return ""


def two_tokens(model: Decoder, caches: list[LayerCache], ops: Any) -> ForwardContext:
    """A context whose arrays have a step's shapes and no meaning."""
    ints: Ints = np.zeros(TOKENS, np.int32)
    arrays = {each.name: ints[:, None] if each.dims == "RM" else ints for each in SENT}
    angles_Tr = np.zeros((TOKENS, model.config.rope.rotary_dim // 2), np.float32)
    return ForwardContext.of(arrays, (angles_Tr, angles_Tr, None), (ints, ints), ops, caches)
