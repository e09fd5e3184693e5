"""Decode steps as CUDA graphs: the model's whole forward pass, recorded for a number of rows and replayed.

A graph is recorded when its number of rows first comes, so that serving starts at once; all share one pool of memory.
What a step brings lies in memory that stays where it is, and rows that a step does not fill are padding: of length 0,
their keys written nowhere. The draws may be part of it. Shapes: R rows, D model width, M blocks of the longest row.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from octavo.batch import SENT, Batch, Ints, NextStep
from octavo.config import EngineConfig
from octavo.layers.context import ForwardContext
from octavo.log import logger
from octavo.models.decoder import Decoder
from octavo.ops.triton import SharedPrefix, TritonOps
from octavo.ops.triton.fused import FusedOps
from octavo.ops.triton.prepare import Arrived, prepare, publish
from octavo.ops.triton.shared import fits, rows_of_tile
from octavo.runner.kv_cache import KVCache
from octavo.runner.prefix_groups import PrefixGroups, find_groups, most_tiles
from octavo.runner.step_buffers import StepBuffers
from octavo.step_layout import StepSize, padded

T = TypeVar("T")

# Rows up to which their order does not matter, since all start at once.
_UNSORTED = 32


def bucket_of(rows: int) -> int:
    """The number of rows that a step of `rows` is padded to."""
    for step, largest in ((1, 2), (4, 16), (8, 32), (16, 256)):
        if rows <= largest:
            return -(-rows // step) * step
    return -(-rows // 32) * 32


def buckets(max_rows: int) -> list[int]:
    """The numbers of rows that steps of up to `max_rows` are padded to, as far as there are so many rows."""
    return sorted({min(bucket_of(rows), max_rows) for rows in range(1, max_rows + 1)})


def most_recorded(max_rows: int) -> int:
    """Graphs that there may be of steps of up to `max_rows` rows: of each number of rows those that draw, with
    beginnings in common and without, and those that do not."""
    return 3 * len(buckets(max_rows))


@dataclass(slots=True)
class RecordedStep:
    graph: torch.cuda.CUDAGraph
    ctx: ForwardContext
    hidden_RD: torch.Tensor


@dataclass(slots=True)
class HeldStep:
    """What a captured decode step leaves on the GPU, so that the next replays the graph without a copy to it."""

    graph: torch.cuda.CUDAGraph
    count: int  # rows, and samples
    place: Ints | None  # on the device of each row; None: they stand in the batch's order


def fused(ops: TritonOps, *, singles: bool) -> TritonOps:
    """The ops for a step's `forward`: those that change no bits of a result, or those that are fastest."""
    return FusedOps(ops, singles=singles) if ops.may_fuse else ops


def forward(model: Decoder, ctx: ForwardContext) -> torch.Tensor:
    """Hidden states of a step, [T, D], all of them computed."""
    hidden_TD = model.forward(ctx)
    if isinstance(ctx.ops, FusedOps):
        ctx.ops.finish()
    return hidden_TD


Key = TypeVar("Key", bound=Hashable)


class Missed(Generic[Key]):
    """The kinds of steps that had no graph, with how often they came. `patience` of them run without one."""

    def __init__(self) -> None:
        self.patience = 0
        self._times: dict[Key, int] = {}

    def waits(self, key: Key) -> bool:
        """Whether a step without a graph is to run without one. Counts it."""
        times = self._times[key] = self._times.get(key, 0) + 1
        if times > self.patience:
            del self._times[key]
        return times <= self.patience

    def take(self) -> Key | None:
        """The kind that came most often, which is then forgotten; None if there is none."""
        key = max(self._times, key=self._times.__getitem__, default=None)
        if key is not None:
            del self._times[key]
        return key


class DecodeKind(NamedTuple):
    """What a decode step is recorded for: `draws` says that its draws are part of it."""

    rows: int
    shared: bool
    draws: bool


class StepGraphs:
    """Steps of one kind as graphs. Use it on one stream alone, with the memory `pool` of all graphs.

    `draw` computes logits and draws, for a step's context, its hidden states and as many samples.
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        ops: TritonOps,
        buffers: StepBuffers,
        drawn_S: torch.Tensor,
        config: EngineConfig,
        pool: Any,
        draw: Callable[[ForwardContext, torch.Tensor, int], None],
    ):
        self._model = model
        self._kv_cache = kv_cache
        self._ops = ops
        self._buffers = buffers
        self._drawn_S = drawn_S
        self._pool = pool
        self._draw = draw
        self.missed: Missed[Any] = Missed()
        self._allocate(config)

    def _allocate(self, config: EngineConfig) -> None:
        """Makes what stays where it is from step to step."""
        raise NotImplementedError

    def _capture(self, what: str, compute: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of `compute`, and what it returns: in the graph's memory, where the replay puts it."""
        began = time.monotonic()
        # Once without recording: kernels are compiled and libraries set up, which may not happen in a recording. What
        # it draws must not stand where the replay looks up the tokens of the step before, which is still to run.
        kept = [(tensor, tensor.clone()) for tensor in (self._drawn_S, self._buffers.control)]
        compute()
        for tensor, content in kept:
            tensor.copy_(content)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        result = compute()
        graph.capture_end()
        logger.debug("recorded a step of %s in %.0f ms", what, (time.monotonic() - began) * 1e3)
        return graph, result


class DecodeGraphs(StepGraphs):
    """Steps in which every row computes one token."""

    def _allocate(self, config: EngineConfig) -> None:
        model, ops = self._model, self._ops
        rows = bucket_of(config.max_num_seqs)
        half = model.config.rope.rotary_dim // 2
        self._token_ids = torch.zeros(rows, dtype=torch.int32, device=model.device)
        self._tables = torch.zeros(rows, config.max_blocks_per_seq, dtype=torch.int32, device=model.device)
        self._angles = torch.zeros(2, rows, half, device=model.device)
        self._rows_of_tile = rows_of_tile(model.config.num_heads // model.config.num_kv_heads)
        self._shares = not ops.invariant and fits(model.config.head_dim, model.norm.weight.dtype, model.device)
        self._recorded: dict[DecodeKind, RecordedStep] = {}
        self._held: HeldStep | None = None

    @staticmethod
    def fits(batch: Batch) -> bool:
        """Whether each row computes one token and none has a rotary stretch of its own."""
        return batch.num_tokens == batch.num_rows and bool((batch.ntk_alpha == 1.0).all())

    @property
    def can_go_on(self) -> bool:
        """Whether the last step on the device was a graph that drew, a sample a row."""
        return self._held is not None

    def forget(self) -> None:
        """Another step's arrays take the place of what is held."""
        self._held = None

    def go_on(self, step: NextStep) -> Ints:
        """The step before once more: all of it is on the device but the blocks that rows get. As `draw`."""
        held = self._held
        assert held is not None, "there is no step to go on from"
        self._buffers.go_on(step.rows if held.place is None else held.place[step.rows], step.blocks)
        held.graph.replay()
        return self._buffers.tokens(held.count)

    def draw(self, batch: Batch) -> Ints | None:
        """Computes the step and draws its samples: where these will be, as `StepBuffers.tokens`; None, and nothing, if
        there is no graph yet and it is not recorded now.

        Rows with a common beginning read it together. They stand in another order than the batch's, which the samples
        know: groups side by side, else the longest first, since what starts last should not take longest.
        """
        groups = None
        order = None
        rows = batch.num_rows
        if self._shares:
            block_size = self._kv_cache.layers[0].k_PBKH.shape[1]
            groups = find_groups(batch.block_tables, batch.seq_lens, block_size, self._rows_of_tile)
        if groups is not None:
            order = groups.order
        elif rows > _UNSORTED:
            order = np.argsort(-batch.seq_lens, kind="stable").astype(np.int32)
        place = None
        if order is not None:
            place = np.empty_like(order)
            place[order] = np.arange(rows, dtype=np.int32)
            batch = batch.in_order(order, place)
        recorded = self._replay(batch, groups, order, draws=True)
        if recorded is None:
            return None
        if len(batch.sample_index) == rows:
            self._held = HeldStep(recorded.graph, rows, place)
        return self._buffers.tokens(len(batch.sample_index))

    def hidden(self, batch: Batch) -> tuple[ForwardContext, torch.Tensor] | None:
        """The context, and hidden states, [R, D], in memory that the next step writes to. None as for `draw`."""
        recorded = self._replay(batch, None, None, draws=False)
        if recorded is None:
            return None
        return recorded.ctx, recorded.hidden_RD[: batch.num_rows]

    def _replay(
        self, batch: Batch, groups: PrefixGroups | None, order: Ints | None, *, draws: bool
    ) -> RecordedStep | None:
        self.forget()
        # A prompt of one token, or its last one, may draw many samples from one row.
        key = DecodeKind(bucket_of(max(batch.num_rows, len(batch.sample_index))), groups is not None, draws)
        recorded = self._recorded.get(key)
        if recorded is None and self.missed.waits(key):
            return None
        self._send(batch, groups, order, key.rows)
        if recorded is None:
            recorded = self._recorded[key] = self._record(*key)
        recorded.graph.replay()
        return recorded

    def _send(self, batch: Batch, groups: PrefixGroups | None, order: Ints | None, bucket: int) -> None:
        places = self._places(bucket)
        arrays = batch.padded(StepSize(bucket), batch.num_rows)
        del arrays["query_start"]
        tables = arrays.pop("block_tables")
        arrays["width"] = np.array([tables.shape[1]], np.int32)
        arrays["order"] = np.arange(bucket, dtype=np.int32) if order is None else padded(order, bucket, 0)
        if groups is not None:
            arrays["lengths"] = padded(groups.lengths, bucket, 0)
            for name, tiles in (("tile_start", groups.tile_start), ("tile_rows", groups.tile_rows)):
                arrays[name] = padded(tiles, places[name].stop - places[name].start, 0)
        arrays["block_tables"] = tables
        self._buffers.send(batch.sample_index, batch.sampling, arrays, places)

    def _places(self, bucket: int) -> dict[str, slice]:
        """Of what is sent but for `query_start`, since each row is a single token; and of the tables' width, each row's
        sample, and the shared lengths with tiles and their rows, tables last."""
        sizes = StepSize(bucket).sizes(SENT, self._tables.shape[1])
        del sizes["query_start"]
        tables, tiles = sizes.pop("block_tables"), most_tiles(bucket, self._rows_of_tile)
        sizes |= {"width": 1, "order": bucket, "lengths": bucket, "tile_start": tiles, "tile_rows": tiles}
        return self._buffers.places(sizes | {"block_tables": tables})

    def _record(self, bucket: int, shared: bool, draws: bool) -> RecordedStep:
        kind = ", of a common beginning" if shared else "" if draws else ", without draws"
        graph, (ctx, hidden_RD) = self._capture(f"{bucket} rows{kind}", lambda: self._compute(bucket, shared, draws))
        return RecordedStep(graph, ctx, hidden_RD)

    def _compute(self, bucket: int, shared: bool, draws: bool) -> tuple[ForwardContext, torch.Tensor]:
        ctx = self._context(fused(self._ops, singles=True), bucket, shared)
        hidden_RD = forward(self._model, ctx)
        if draws:
            self._draw(ctx, hidden_RD, bucket)
            publish(self._drawn_S, self._buffers.control, self._buffers.drawn)
        return ctx, hidden_RD

    def _context(self, ops: TritonOps, bucket: int, shared: bool) -> ForwardContext:
        sent = self._buffers.tensors(self._places(bucket))
        token_ids, tables, (cos, sin) = self._token_ids[:bucket], self._tables[:bucket], self._angles[:, :bucket]
        rope, buffers, positions = self._model.rope, self._buffers, sent["positions"]
        arrived = Arrived(
            control_2=buffers.control,
            blocks_TR=buffers.blocks,
            states_S=buffers.asked(bucket).states_S,
            given_R=sent["token_ids"],
            positions_R=positions,
            slots_R=sent["slots"],
            seq_lens_R=sent["seq_lens"],
            sample_of_row_R=sent["order"],
            width_1=sent["width"],
            packed=sent["block_tables"],
        )
        block_size = self._kv_cache.layers[0].k_PBKH.shape[1]
        prepare(arrived, self._drawn_S, block_size, rope.inv_freq, rope.magnitude, token_ids, cos, sin, tables)
        if self._ops.invariant:  # the same functions as in steps that are no graph
            cos, sin = rope.cos_sin(positions)
        if shared:
            ops = ops.sharing(SharedPrefix(sent["lengths"], sent["tile_start"], sent["tile_rows"]))
        every_row = np.arange(bucket + 1, dtype=np.int32)
        # Where rows begin is not read: each is a single token.
        arrays = sent | {"token_ids": token_ids, "block_tables": tables, "query_start": positions}
        host = every_row, every_row[1:]
        return ForwardContext.of(arrays, (cos, sin, rope.q_scale(positions)), host, ops, self._kv_cache.layers)
