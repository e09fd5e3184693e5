"""Where a step runs. The engine submits a batch and asks for its result later.

Between the two lies any number of processes and devices, or none; nobody above can tell.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Batch, Ints, NextStep, StepResult
from octavo.checkpoint import Checkpoint
from octavo.config import EngineConfig

if TYPE_CHECKING:
    from octavo.models.decoder import Decoder
    from octavo.runner.cpu import KernelRunner
    from octavo.runner.cuda_memory import Measured
    from octavo.runner.cuda_runner import CudaRunner, SubmittedStep
    from octavo.runner.kv_cache import KVCache
    from octavo.runner.model_runner import ModelRunner

    Settle = Callable[[Measured], EngineConfig]
    Whole = Callable[[], Batch]


class Executor(Protocol):
    """Results come in the order of submission. After `shutdown` nothing may be called.

    `depth` steps may be submitted before the first result is asked for: a device with a depth of 2 has the next step
    ready while the host reads what the last one drew.
    """

    depth: int

    def submit(self, step: Batch | NextStep, whole: Whole) -> None:
        """Starts a step. `whole` gives the Batch that a `NextStep` stands for, until another step is scheduled."""

    def result(self) -> StepResult: ...

    def read_blocks(self, blocks: Ints) -> NDArray[np.uint8]:
        """The bytes of `blocks` as they are now, [n, `block_bytes`]; a Batch's `loaded_bytes` puts them back."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def layout(self) -> str:
        """Names the arithmetic and the order of the bytes in a block; blocks of another layout are no use here."""

    def warm_up(self) -> None:
        """Does beforehand what the first requests would wait for, as the configuration says."""

    def prepare(self) -> bool:
        """Does something that later steps would wait for, while there is no work; False if there is nothing."""

    def reset(self) -> None:
        """Forgets the steps that are under way, even if one of them failed."""

    def shutdown(self) -> None: ...


class LocalExecutor:
    """One device in this process; a step is computed when it is submitted."""

    depth = 1

    def __init__(self, runner: ModelRunner | KernelRunner):
        self.runner = runner
        self._results: deque[StepResult] = deque()

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto") -> LocalExecutor:
        """Loads the model and makes its cache as `config` says; raises as `load_model` does."""
        if config.device == "cpu" and config.weights != "plain":
            from octavo.runner.cpu import kernel_runner

            return cls(kernel_runner(checkpoint, config, load_format))
        from octavo.runner.model_runner import ModelRunner

        return cls(ModelRunner(_load_model(checkpoint, config, load_format), _make_cache(config)))

    def submit(self, step: Batch | NextStep, whole: Whole) -> None:
        self._results.append(self.runner.run(step if isinstance(step, Batch) else whole()))

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

    def warm_up(self) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def reset(self) -> None:
        self._results.clear()

    def shutdown(self) -> None:
        self._results.clear()


class CudaExecutor:
    """One GPU in this process: a submitted step runs while the host goes on."""

    depth = 2

    def __init__(self, runner: CudaRunner, config: EngineConfig):
        from octavo.runner.warm_up import WarmUp

        self.runner = runner
        self._warm_up = WarmUp(runner, config)
        self._steps: deque[SubmittedStep] = deque()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto", settle: Settle | None = None
    ) -> CudaExecutor:
        """Loads the model and makes its cache as `config` says; raises as `load_model` does.

        `settle` is told what memory the model and its largest steps take, and gives the `config` to go on with.
        """
        from octavo.runner.cuda_memory import let_segments_grow, measure, record_largest
        from octavo.runner.cuda_runner import CudaRunner

        let_segments_grow()
        model = _load_model(checkpoint, config, load_format)
        if settle is not None:
            config = settle(measure(model, config))
        runner = CudaRunner(model, _make_cache(config), config)
        record_largest(runner, config)
        return cls(runner, config)

    def submit(self, step: Batch | NextStep, whole: Whole) -> None:
        self._steps.append(self.runner.submit(step, whole))

    def result(self) -> StepResult:
        assert self._steps, "result() without a submit()"
        return self._steps.popleft().result()

    def read_blocks(self, blocks: Ints) -> NDArray[np.uint8]:
        return self.runner.read_blocks(blocks)

    @property
    def block_bytes(self) -> int:
        return self.runner.kv_cache.block_bytes

    @property
    def layout(self) -> str:
        return self.runner.layout

    def warm_up(self) -> None:
        self._warm_up.run()

    def prepare(self) -> bool:
        return self._warm_up.one_more()

    def reset(self) -> None:
        while self._steps:
            with contextlib.suppress(Exception):
                self.result()

    def shutdown(self) -> None:
        while self._steps:
            self.result()


def load_executor(
    checkpoint: Checkpoint, config: EngineConfig, load_format: str = "auto", settle: Settle | None = None
) -> Executor:
    """The executor for `config`'s device, or for what `settle` makes of it where memory is measured.

    Raises as `load_model` and `settle` do.
    """
    if config.device == "cuda" and find_spec("triton"):
        return CudaExecutor.load(checkpoint, config, load_format, settle)
    return LocalExecutor.load(checkpoint, config, load_format)


def _load_model(checkpoint: Checkpoint, config: EngineConfig, load_format: str) -> Decoder:
    import torch

    from octavo.models.loader import load_model

    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    return load_model(checkpoint, config.model, dtype, device, load_format, fp8=config.weights == "fp8")


def _make_cache(config: EngineConfig) -> KVCache:
    import torch

    from octavo.runner.kv_cache import KVCache, kv_torch_dtype

    dtype, device = kv_torch_dtype(config.kv_dtype), torch.device(config.device)
    return KVCache(
        config.model, config.num_blocks, config.block_size, dtype, device, num_host_blocks=config.num_host_blocks
    )
