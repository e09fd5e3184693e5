"""How much of a GPU's memory a step takes at most: measured, by computing the largest steps once over a tiny cache.

What the driver says is counted, so that kernels, libraries' work spaces and graphs are in it. The cache gets the rest.
"""

import gc
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from octavo.batch import Batch, PromptLogprobs, SamplingColumns
from octavo.config import EngineConfig, format_size
from octavo.errors import CapacityError
from octavo.models.decoder import Decoder
from octavo.runner.cuda_graphs import most_recorded
from octavo.runner.cuda_runner import CudaRunner
from octavo.runner.kv_cache import KVCache, kv_torch_dtype
from octavo.runner.prompt_graphs import MOST_GRAPHS, most_tokens, size_of

# For blocks gathered on their way to or from the host, and pieces of memory that happen not to fit each other.
_MARGIN = 256 * 1024**2
# Of a recorded step, for each layer.
_GRAPH_BYTES_PER_LAYER = 64 * 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes that are taken by the weights, and at most by steps; and the seconds that it took to find out."""

    weights: int
    working: int
    seconds: float


def let_segments_grow() -> None:
    """Has torch map more pages behind a segment of memory instead of asking for another, unless the user says how.

    Steps of ever more samples would otherwise leave a segment of each size behind, too small for the next: 4 GiB were
    seen beside steps that need 0.4.
    """
    if not (os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def measure(model: Decoder, config: EngineConfig) -> Measured:
    """For a model that is loaded, with the step sizes of `config`; raises `CapacityError` where a step does not fit."""
    began = time.monotonic()
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    try:
        _run_largest_steps(model, config)
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"weights need {format_size(weights)}, and the largest step does not fit into the {format_size(free)}"
            f" beside them; lower max_num_batched_tokens ({config.max_num_batched_tokens}) or max_num_seqs"
            f" ({config.max_num_seqs}), or use a smaller or quantized model"
        ) from None
    torch.cuda.synchronize()
    graphs = (most_recorded(config.max_num_seqs) + MOST_GRAPHS) * _GRAPH_BYTES_PER_LAYER * config.model.num_layers
    working = free - torch.cuda.mem_get_info()[0] + _MARGIN + graphs
    gc.collect()
    torch.cuda.empty_cache()
    return Measured(weights, working, time.monotonic() - began)


def _run_largest_steps(model: Decoder, config: EngineConfig) -> None:
    cache = KVCache(config.model, 1, config.block_size, kv_torch_dtype(config.kv_dtype), model.device)
    runner = CudaRunner(model, cache, config)
    runner.start(largest_chunks(config)).result()
    record_largest(runner, config)


def record_largest(runner: CudaRunner, config: EngineConfig) -> None:
    """Has the graphs recorded that take most memory: what they leave is enough for any other."""
    runner.start(largest_prompt(config)).result()
    runner.start(largest_decode(config)).result()


def largest_decode(config: EngineConfig) -> Batch:
    """A decode step of the most rows with a shared prefix, which takes more memory than one without."""
    rows = config.max_num_seqs
    keys = min(config.max_model_len, 2 * 256 + 1)
    return batch_of(config, np.full(rows, keys, np.int32), np.ones(rows, np.int32), columns_of(rows))


def largest_prompt(config: EngineConfig) -> Batch:
    """The largest prefill step that is a CUDA graph: most rows first (each needs logits), then most tokens."""
    rows = max(1, min(config.max_num_seqs, config.max_num_batched_tokens - 1))

    def tokens_of(prompts: int) -> int:
        return min(
            most_tokens(config), config.max_num_batched_tokens - (rows - prompts), prompts * config.max_model_len
        )

    def size(prompts: int) -> tuple[int, int]:
        singles, tokens, padded = size_of(rows - prompts, tokens_of(prompts), prompts, config.max_num_seqs) or (0, 0, 0)
        return singles + padded, tokens

    prompts = max(range(1, rows + 1), key=size)
    tokens = tokens_of(prompts)
    counts = np.ones(rows, np.int32)
    counts[rows - prompts :] = tokens // prompts
    counts[rows - prompts : rows - prompts + tokens % prompts] += 1
    return batch_of(config, counts, counts, columns_of(rows))


def largest_chunks(config: EngineConfig) -> Batch:
    """As many tokens as a step may have in as many rows as there may be, each of which asks for all that there is."""
    rows = config.max_num_seqs
    most = min(config.max_num_batched_tokens, rows * config.max_model_len)
    counts = np.full(rows, most // rows, np.int32)
    counts[: most % rows] += 1
    columns = columns_of(rows)
    columns.top_k[:] = config.model.vocab_size // 2
    columns.top_p[:] = 0.9999
    columns.min_p[:] = 1e-9
    # Hot enough for all tokens to be about as likely, so that top_p has to look at all of them.
    columns.temperature[:] = 1e6
    columns.num_logprobs[:] = 20
    every = np.arange(rows, dtype=np.int32)
    columns.bias_sample, columns.bias_token = every, np.zeros(rows, np.int32)
    columns.bias_value = np.ones(rows, np.float32)
    columns.allowed_sample, columns.allowed_start = every, np.arange(rows + 1, dtype=np.int32) * 1000
    columns.allowed_token = np.tile(np.arange(1000, dtype=np.int32) % config.model.vocab_size, rows)
    columns.penalty_sample, columns.penalty_start = every, np.arange(rows + 1, dtype=np.int32) * 1000
    columns.penalty_token = columns.allowed_token
    columns.penalty_count, columns.penalty_pending = np.zeros(1000 * rows, np.int32), np.zeros(rows, np.int32)
    columns.repetition_penalty = columns.presence_penalty = columns.frequency_penalty = np.ones(rows, np.float32)
    batch = batch_of(config, counts, counts, columns)
    wanted = np.arange(min(512, most), dtype=np.int32)
    batch.prompt_logprobs = PromptLogprobs(wanted, np.zeros_like(wanted), np.full_like(wanted, 20))
    return batch


def columns_of(rows: int) -> SamplingColumns:
    """Draws at a temperature of 1, and nothing else."""
    return SamplingColumns(
        temperature=np.ones(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        counter=np.zeros(rows, np.int32),
        num_logprobs=np.full(rows, -1, np.int32),
    )


def batch_of(config: EngineConfig, seq_lens: np.ndarray, counts: np.ndarray, columns: SamplingColumns) -> Batch:
    """Rows over block 0 alone, whose keys and values are written nowhere."""
    tables = np.zeros((len(counts), -(-int(seq_lens.max()) // config.block_size)), np.int32)
    token_ids = np.zeros(int(counts.sum()), np.int32)
    batch = Batch.of_rows(token_ids, seq_lens - counts, tables, config.block_size, counts)
    batch.slots[:] = -1
    batch.sample_index, batch.sampling = batch.query_start[1:] - 1, columns
    return batch
