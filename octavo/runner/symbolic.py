"""A model's code run on symbols: what a device that records or fuses ops must know before it trusts itself to."""

from typing import Any

import numpy as np

from octavo.batch import Ints
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
    zeros_T: Any = ints
    angles_Tr: Any = np.zeros((TOKENS, model.config.rope.rotary_dim // 2), np.float32)
    return ForwardContext(
        ops=ops,
        caches=caches,
        token_ids_T=zeros_T,
        positions_T=zeros_T,
        slots_T=zeros_T,
        query_start_R1=zeros_T,
        seq_lens_R=zeros_T,
        block_tables_RM=zeros_T[:, None],
        cos_Tr=angles_Tr,
        sin_Tr=angles_Tr,
        q_scale_T=None,
        query_start_host=ints,
        seq_lens_host=ints,
    )
