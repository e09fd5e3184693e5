"""Hand-built steps for tests of everything below the engine: sequences, scattered blocks, flat batches."""

from dataclasses import dataclass, field

import numpy as np
import torch

from octavo import ops
from octavo.batch import Batch, PromptLogprobs, SamplingColumns, StepResult
from octavo.layers.context import ForwardContext
from octavo.runner.model_runner import ModelRunner


def columns(num_samples: int, **given: object) -> SamplingColumns:
    """Greedy sampling columns; a keyword sets a column, from a number or a list."""
    defaults: dict[str, tuple[object, type]] = {
        "temperature": (0.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seed": (0, np.uint64),
        "counter": (0, np.int32),
        "num_logprobs": (-1, np.int32),
    }
    made = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(given.pop(name, value), dtype), (num_samples,)))
        for name, (value, dtype) in defaults.items()
    }
    floats = ("bias_value", "repetition_penalty", "presence_penalty", "frequency_penalty")
    more = {name: np.asarray(value, np.float32 if name in floats else np.int32) for name, value in given.items()}
    return SamplingColumns(**made, **more)


@dataclass
class Row:
    """A sequence under test."""

    token_ids: list[int]
    ntk_alpha: float = 1.0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    num_prompt: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)
        self.num_prompt = len(self.token_ids)


class Steps:
    """Runs rows step by step over a runner's cache, handing out its blocks in a shuffled order."""

    def __init__(self, runner: ModelRunner, seed: int = 0):
        self.runner = runner
        num_blocks, self.block_size = runner.kv_cache.layers[0].k_PBKH.shape[:2]
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def batch(self, work: list[tuple[Row, int]], sampling: SamplingColumns | None = None) -> Batch:
        """`work` is (row, how many more tokens to compute); rows that become complete draw a sample."""
        tokens, samples = [], []
        first = np.array([row.num_computed for row, _ in work], np.int32)
        for row, count in work:
            end = row.num_computed + count
            while len(row.block_table) * self.block_size < end:
                row.block_table.append(self.free.pop())
            tokens += row.token_ids[row.num_computed : end]
            row.num_computed = end
            if end == len(row.token_ids):
                samples.append(len(tokens) - 1)
        tables = np.zeros((len(work), max(len(row.block_table) for row, _ in work)), np.int32)
        for i, (row, _) in enumerate(work):
            tables[i, : len(row.block_table)] = row.block_table
        counts = np.array([count for _, count in work], np.int32)
        alpha = np.array([row.ntk_alpha for row, _ in work], np.float32)
        batch = Batch.of_rows(np.array(tokens, np.int32), first, tables, self.block_size, counts, {"ntk_alpha": alpha})
        batch.sample_index, batch.sampling = np.array(samples, np.int32), sampling or columns(len(samples))
        return batch

    def run(self, work: list[tuple[Row, int]], sampling: SamplingColumns | None = None) -> StepResult:
        """One step; drawn tokens are appended to their rows."""
        complete = [row for row, count in work if row.num_computed + count == len(row.token_ids)]
        result = self.runner.run(self.batch(work, sampling))
        for row, token in zip(complete, result.token_ids.tolist(), strict=True):
            row.token_ids.append(token)
        return result

    def generate(self, rows: list[Row], num_tokens: int, chunk: int = 10**9) -> list[list[int]]:
        """Greedy answers of `num_tokens`, all rows together, prompts in chunks of at most `chunk`."""
        while waiting := [row for row in rows if len(row.token_ids) < row.num_prompt + num_tokens]:
            self.run([(row, min(chunk, len(row.token_ids) - row.num_computed)) for row in waiting])
        return [row.token_ids[row.num_prompt :] for row in rows]

    def prompt_logprobs(self, row: Row, count: int, k: int) -> StepResult:
        """A step over `count` more of the row's tokens; asks for log probabilities of what follows each."""
        start = row.num_computed
        batch = self.batch([(row, count)])
        follow = row.token_ids[start + 1 : start + count + 1]
        batch.prompt_logprobs = PromptLogprobs(
            token_index=np.arange(len(follow), dtype=np.int32),
            target=np.array(follow, np.int32),
            num_logprobs=np.full(len(follow), k, np.int32),
        )
        return self.runner.run(batch)


def all_logits(runner: ModelRunner, row: Row) -> torch.Tensor:
    """[T, V] of all the row's tokens, computed in one step."""
    batch = Steps(runner).batch([(row, len(row.token_ids))])
    with torch.inference_mode():
        ctx = ForwardContext.build(
            batch, runner.kv_cache.layers, runner.model.rope, ops.for_device(runner.device), runner.device
        )
        return runner.model.logits(runner.model.forward(ctx), ctx)
