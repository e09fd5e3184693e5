"""Where a step runs. The engine submits a batch and asks for its result later.

Between the two lies any number of processes and devices, or none; nobody above can tell.
"""

from collections import deque
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Batch, Ints, StepResult
from octavo.checkpoint import Checkpoint
from octavo.config import EngineConfig
from octavo.models.loader import load_model
from octavo.runner.cpu import kernel_runner
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner


class Executor(Protocol):
    """Results come in the order of submission. After `shutdown` nothing may be called."""

    def submit(self, batch: Batch) -> None: ...

    def result(self) -> StepResult: ...

    def read_blocks(self, blocks: Ints) -> NDArray[np.uint8]:
        """The bytes of `blocks` as they are now, [n, `block_bytes`]; a Batch's `loaded_bytes` puts them back."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def layout(self) -> str:
        """Names the arithmetic and the order of the bytes in a block; blocks of another layout are no use here."""

    def shutdown(self) -> None: ...


class LocalExecutor:
    """One device in this process; a step is computed when it is submitted."""

    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self._results: deque[StepResult] = deque()

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto") -> "LocalExecutor":
        """Loads the model and makes its cache as `config` says; raises as `load_model` does."""
        if config.weights != "plain":
            return cls(kernel_runner(checkpoint, config, load_format))
        device = torch.device(config.device)
        model = load_model(checkpoint, config.model, getattr(torch, config.dtype), device, load_format)
        dtype = getattr(torch, config.kv_dtype)
        cache = KVCache(
            config.model, config.num_blocks, config.block_size, dtype, device, num_host_blocks=config.num_host_blocks
        )
        return cls(ModelRunner(model, cache))

    def submit(self, batch: Batch) -> None:
        self._results.append(self.runner.run(batch))

    def result(self) -> StepResult:
        assert self._results, "result() without a submit()"
        return self._results.popleft()

    def read_blocks(self, blocks: Ints) -> NDArray[np.uint8]:
        return self.runner.kv_cache.read_blocks(blocks)

    @property
    def block_bytes(self) -> int:
        return self.runner.kv_cache.block_bytes

    @property
    def layout(self) -> str:
        return self.runner.layout

    def shutdown(self) -> None:
        self._results.clear()
