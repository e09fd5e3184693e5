"""Steps with prompts in them as CUDA graphs: some rows draw, others compute a prompt, or a part of one.

A step of few prompt tokens takes the GPU less time than Python needs to launch its kernels. It is padded to a size that
comes again, and recorded when it comes for the second time. Long steps are left to whoever launches them one by one:
there the GPU takes longer than the host.

    tokens     [ S of rows with one token, and padding | T of prompts, and padding ]
    rows       [ S                                     | P ]

Padding among the single rows has length 0; prompt tokens behind the last row belong to none, and rows without tokens
have nothing to do.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from octavo.batch import Batch, Ints
from octavo.layers.context import ForwardContext
from octavo.models.decoder import Decoder
from octavo.ops.triton import TritonOps, leading_singles
from octavo.ops.triton.prepare import look_up, publish, spread
from octavo.runner.kv_cache import KVCache
from octavo.runner.step_buffers import StepBuffers, padded

_SINGLES = (0, 4, 16, 64, 256, 512, 1024)
_TOKENS = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
# Prompts a step, by the tokens that it has room for: more of them are shorter than it is worth.
_TOKENS_A_ROW = 32
MOST_TOKENS = _TOKENS[-1]

Size = tuple[int, int, int]  # single rows, tokens of prompts, prompts


def size_of(singles: int, tokens: int, prompts: int, max_rows: int) -> Size | None:
    """The size that a step is padded to; None if it is too large, or has no prompts."""
    room = next((room for room in _TOKENS if tokens <= room and prompts <= _rows_for(room)), 0)
    rows = next((rows for rows in _SINGLES if singles <= rows), max_rows)
    return (min(rows, max_rows), room, _rows_for(room)) if room and prompts else None


def most_rows(max_rows: int) -> int:
    """Rows of the largest of these steps, where no step has more than `max_rows`."""
    return max_rows + _rows_for(MOST_TOKENS)


def _rows_for(tokens: int) -> int:
    return max(2, tokens // _TOKENS_A_ROW)


class PromptGraphs:
    """Steps that end by drawing. Use it on one stream alone, with the memory `pool` of other graphs.

    `draw` computes logits and draws, for a step's context, its hidden states and as many samples.
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        ops: TritonOps,
        buffers: StepBuffers,
        drawn_S: torch.Tensor,
        max_rows: int,
        max_blocks: int,
        pool: Any,
        draw: Callable[[ForwardContext, torch.Tensor, int], None],
    ):
        self._model = model
        self._kv_cache = kv_cache
        self._ops = ops
        self._buffers = buffers
        self._drawn_S = drawn_S
        rows = most_rows(max_rows)
        self._tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=model.device)
        self._max_rows = max_rows
        self._pool = pool
        self._draw = draw
        self._seen: Counter[Size] = Counter()
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}

    def draw(self, batch: Batch) -> Ints | None:
        """Computes the step and draws its samples: where these will be, as `StepBuffers.tokens`. None, and nothing, if
        there is no graph of this size and none to be made yet, or a row has a rotary stretch of its own."""
        singles = leading_singles(batch.query_start)
        size = size_of(singles, batch.num_tokens - singles, batch.num_rows - singles, self._max_rows)
        if size is None or self._ops.invariant or (batch.ntk_alpha != 1.0).any():
            return None
        graph = self._graphs.get(size)
        self._seen[size] += 1
        if graph is None and self._seen[size] == 1:
            return None
        self._send(batch, singles, size)
        if graph is None:
            graph = self._graphs[size] = self._record(size)
        graph.replay()
        return self._buffers.tokens(len(batch.sample_index))

    def _send(self, batch: Batch, singles: int, size: Size) -> None:
        S, T, P = size
        more = S - singles  # tokens that are padding among the singles, and rows

        def tokens(array: Ints, padding: int) -> Ints:
            return np.concatenate((padded(array[:singles], S, padding), padded(array[singles:], T, padding)))

        def rows(array: Ints, padding: int) -> Ints:
            return np.concatenate((padded(array[:singles], S, padding), padded(array[singles:], P, padding)))

        index = batch.sample_index
        starts = batch.query_start[singles:] + np.int32(more)
        tables = batch.block_tables
        self._buffers.send(
            np.where(index < singles, index, index + np.int32(more)),
            batch.sampling,
            [
                np.array([tables.shape[1]], np.int32),
                tokens(batch.token_ids, 0),
                tokens(batch.positions, 0),
                tokens(batch.slots, -1),
                np.concatenate((np.arange(S, dtype=np.int32), padded(starts, P + 1, int(starts[-1])))),
                rows(batch.seq_lens, 0),
                np.concatenate((tables[:singles], np.zeros((more, tables.shape[1]), np.int32), tables[singles:])),
            ],
            self._places(size),
        )

    def _places(self, size: Size) -> list[slice]:
        """Of the tables' width, token ids, positions, slots, where rows start, lengths, tables."""
        S, T, P = size
        return self._buffers.places((1, S + T, S + T, S + T, S + P + 1, S + P, (S + P) * self._tables.shape[1]))

    def _record(self, size: Size) -> torch.cuda.CUDAGraph:
        kept = [(tensor, tensor.clone()) for tensor in (self._drawn_S, self._buffers.control)]
        self._compute(size)
        for tensor, content in kept:
            tensor.copy_(content)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._compute(size)
        graph.capture_end()
        return graph

    def _compute(self, size: Size) -> None:
        S, T, P = size
        width, given, positions, slots, query_start, seq_lens, packed = map(self._buffers.at, self._places(size))
        tables = self._tables[: S + P]
        spread(packed, width, tables)
        rope = self._model.rope
        cos, sin = rope.cos_sin(positions)
        ctx = ForwardContext(
            ops=self._ops,
            caches=self._kv_cache.layers,
            token_ids_T=look_up(given, self._drawn_S),
            positions_T=positions,
            slots_T=slots,
            query_start_R1=query_start,
            seq_lens_R=seq_lens,
            block_tables_RM=tables,
            cos_Tr=cos,
            sin_Tr=sin,
            q_scale_T=rope.q_scale(positions),
            # How many rows have one token, how many tokens the others, and how many others there are: no more is read.
            query_start_host=np.array([*range(S + 1), *[S + T] * P], np.int32),
            seq_lens_host=np.zeros(S + P, np.int32),
        )
        self._draw(ctx, self._model.forward(ctx), S + P)
        publish(self._drawn_S, self._buffers.control, self._buffers.drawn)
