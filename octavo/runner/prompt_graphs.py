"""Steps with prompts in them as CUDA graphs: some rows draw, others compute a prompt, or a part of one.

A step of few tokens takes the GPU less time than Python needs to launch its kernels. It is padded to a size that comes
again, and recorded when that comes first. Where the GPU takes longer than the host, kernels are launched one by one.

    tokens     [ S of rows with one token, and padding | T of prompts, and padding ]
    rows       [ S                                     | P ]

Padding among the single rows has length 0; prompt tokens behind the last row belong to none, and rows without tokens
have nothing to do.
"""

import numpy as np
import torch

from octavo.batch import SENT, Batch, Ints
from octavo.config import EngineConfig
from octavo.layers.context import ForwardContext
from octavo.ops.triton import leading_singles
from octavo.ops.triton.prepare import look_up, publish, spread
from octavo.runner.cuda_graphs import StepGraphs, forward, fused
from octavo.step_layout import StepSize

_SINGLES = (0, 4, 16, 64, 128, 256, 384, 512, 768, 1024)
_PROMPTS = (4, 16, 64, 256)
# Beyond these, the one that was used longest ago is forgotten: its last step is long over.
MOST_GRAPHS = 128
# Tokens times weights of a layer that a GPU multiplies, at 600 TFLOP/s, in the 1.4 ms that a slow host needs for a
# layer beside a server; 0.6 are the least that were seen.
_WORTH_IT = 4.2e11


def most_tokens(config: EngineConfig) -> int:
    """Tokens of prompts in the largest step that is worth a graph."""
    weights = config.model.matrix_parameters() / config.model.num_layers
    return min(config.max_num_batched_tokens, max(512, int(_WORTH_IT / weights)))


def room_for(tokens: int) -> int:
    """The number of tokens that `tokens` are padded to."""
    step = next((step for step, largest in ((32, 128), (64, 512), (128, 1024)) if tokens <= largest), 256)
    return -(-tokens // step) * step


def size_of(singles: int, tokens: int, prompts: int, max_rows: int) -> StepSize | None:
    """The size that a step is padded to; None if it has no prompts, or too many."""
    rows = next((rows for rows in _SINGLES if singles <= rows), max_rows)
    room = next((room for room in _PROMPTS if prompts <= room), 0)
    return StepSize(min(rows, max_rows), room_for(tokens), min(room, max_rows)) if prompts and room else None


def sizes(config: EngineConfig) -> list[StepSize]:
    """All sizes, by their tokens and then their single rows; those of few prompts first."""
    tokens, room = [], 0
    while room < room_for(most_tokens(config)):
        tokens.append(room := room_for(room + 1))
    singles = sorted({min(rows, config.max_num_seqs) for rows in _SINGLES})
    prompts = sorted({min(room, config.max_num_seqs) for room in _PROMPTS})
    return [StepSize(S, T, P) for P in prompts for T in tokens for S in singles]


def most_rows(max_rows: int) -> int:
    """Rows of the largest of these steps, where no step has more than `max_rows`."""
    return max_rows + min(_PROMPTS[-1], max_rows)


class PromptGraphs(StepGraphs):
    """Steps that end by drawing."""

    def _allocate(self, config: EngineConfig) -> None:
        self._max_rows, self._max_tokens = config.max_num_seqs, most_tokens(config)
        shape = most_rows(self._max_rows), config.max_blocks_per_seq
        self._tables = torch.zeros(*shape, dtype=torch.int32, device=self._model.device)
        self._graphs: dict[StepSize, torch.cuda.CUDAGraph] = {}  # what was used last stands last

    def draw(self, batch: Batch) -> Ints | None:
        """Computes the step and draws its samples: where these will be, as `StepBuffers.tokens`. None, and nothing, if
        it is too large to be worth it, a row has a rotary stretch of its own, or a graph is still to be recorded, but
        not now."""
        singles = leading_singles(batch.query_start)
        tokens = batch.num_tokens - singles
        # As many samples are drawn as there are rows, and a prompt may ask for many.
        prompts = max(batch.num_rows, len(batch.sample_index)) - singles
        size = size_of(singles, tokens, prompts, self._max_rows)
        if size is None or tokens > self._max_tokens or self._ops.invariant or (batch.ntk_alpha != 1.0).any():
            return None
        graph = self._graphs.pop(size, None)
        if graph is None and self.missed.waits(size):
            return None
        self._send(batch, singles, size)
        if graph is None:
            graph = self._record(size)
            if len(self._graphs) == MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[size] = graph
        graph.replay()
        return self._buffers.tokens(len(batch.sample_index))

    def _send(self, batch: Batch, singles: int, size: StepSize) -> None:
        index = batch.sample_index
        arrays = {"width": np.array([batch.block_tables.shape[1]], np.int32)} | batch.padded(size, singles)
        self._buffers.send(
            np.where(index < singles, index, index + np.int32(size.decode_rows - singles)),
            batch.sampling,
            arrays,
            self._places(size),
        )

    def _places(self, size: StepSize) -> dict[str, slice]:
        return self._buffers.places({"width": 1} | size.sizes(SENT, self._tables.shape[1]))

    def _record(self, size: StepSize) -> torch.cuda.CUDAGraph:
        S, T, P = size
        return self._capture(f"{S} rows and {T} tokens of {P} prompts", lambda: self._compute(size))[0]

    def _compute(self, size: StepSize) -> None:
        S, T, P = size
        arrays = self._buffers.tensors(self._places(size))
        tables = self._tables[: S + P]
        spread(arrays["block_tables"], arrays.pop("width"), tables)
        angles = self._model.rope.angles(arrays["positions"])
        arrays |= {"token_ids": look_up(arrays["token_ids"], self._drawn_S), "block_tables": tables}
        # How many rows have one token, how many tokens the others, and how many others there are: no more is read.
        host = np.array([*range(S + 1), *[S + T] * P], np.int32), np.zeros(S + P, np.int32)
        ctx = ForwardContext.of(arrays, angles, host, fused(self._ops, singles=False), self._kv_cache.layers)
        self._draw(ctx, forward(self._model, ctx), S + P)
        publish(self._drawn_S, self._buffers.control, self._buffers.drawn)
