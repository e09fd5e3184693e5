"""What a GPU prepares before requests wait for it: steps are recorded, and kernels compiled, in the order of need.

A step's graph is recorded when a step of its size first comes, which takes as long as ten steps, or minutes where
kernels are not compiled yet. The steps here compute and write nothing that anybody reads.
"""

import time
from collections.abc import Iterator

import numpy as np

from octavo.batch import Batch
from octavo.config import EngineConfig
from octavo.log import logger
from octavo.runner.cuda_graphs import buckets
from octavo.runner.cuda_memory import batch_of, columns_of
from octavo.runner.cuda_runner import CudaRunner
from octavo.runner.prompt_graphs import most_tokens, size_of, sizes
from octavo.step_layout import StepSize

_LOOKED_AT = 6  # steps after which it is said how long the rest will take
# Beside few rows with a token each prompts of any length that is recorded are usual, beside many of so many tokens.
_FEW, _USUAL = 64, 1024
# Steps of a size without a graph before it is recorded while others wait: without one each takes some 6 ms longer, and
# a recording 50.
_PATIENCE = 8


class WarmUp:
    """Records steps of `runner`: `run` before requests come, `one_more` whenever none is there."""

    def __init__(self, runner: CudaRunner, config: EngineConfig):
        self._runner = runner
        self._config = config

    def run(self) -> None:
        """Records the steps of `config.warm_up`, and says what it does and how long it will take.

        After that a step that was not foreseen runs without a graph at first.
        """
        began = time.monotonic()
        steps = list(self._steps())
        for done, step in enumerate(steps, 1):
            self._runner.start(step).result()
            if done == _LOOKED_AT and len(steps) > done:
                left = (time.monotonic() - began) / done * (len(steps) - done)
                logger.info(
                    "warm-up: records %d kinds of steps, about %.0f s more (--warm-up none leaves it out)",
                    *(len(steps), left),
                )
        if steps:
            self._runner.forward.be_patient(_PATIENCE)

    def one_more(self) -> bool:
        """Records a step that ran without a graph; False if there is none."""
        missed = self._runner.forward.take_missed()
        if missed is None:
            return False
        self._runner.forward.be_patient(0)
        try:
            step = self._prompt(missed) if isinstance(missed, StepSize) else self._decode(*missed)
            if step is not None:
                self._runner.start(step).result()
        finally:
            self._runner.forward.be_patient(_PATIENCE)
        return True

    def _steps(self) -> Iterator[Batch]:
        """One step of each kind, what comes most often first."""
        config = self._config
        if config.warm_up == "none":
            return
        rows = buckets(config.max_num_seqs)
        yield from (self._decode(count) for count in rows)
        few = min(4, config.max_num_seqs)
        every = sizes(config)
        usual = [size for size in every if size.rows == few and (size.tokens <= _USUAL or size.decode_rows <= _FEW)]
        yield from filter(None, map(self._prompt, usual))
        yield from self._large()
        # Rows that want log probabilities, penalties or bias are drawn outside of the graph.
        yield from (self._decode(count, draws=False) for count in rows)
        yield from (self._decode(count, shared=True) for count in rows if count > 1)
        if config.warm_up == "full":
            yield from filter(None, map(self._prompt, (size for size in every if size not in set(usual))))

    def _decode(self, count: int, shared: bool = False, draws: bool = True) -> Batch:
        """A token for each of `count` rows, with a beginning of several blocks in common, or none."""
        columns = columns_of(count)
        if not draws:
            columns.num_logprobs[:] = 1
        keys = min(self._config.max_model_len, 2 * 256 + 1) if shared else 1
        return batch_of(self._config, np.full(count, keys, np.int32), np.ones(count, np.int32), columns)

    def _large(self) -> Iterator[Batch]:
        """Steps that no graph is recorded for, so that their kernels are there: those of any length, odd ones too."""
        config = self._config
        most = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
        lengths = {most - most % 16, most - most % 16 - 3, most_tokens(config) + 16, most_tokens(config) + 19}
        for tokens in sorted(length for length in lengths if most_tokens(config) < length <= most):
            for rows in sorted({-(-tokens // config.max_model_len), min(8, config.max_num_seqs)}):
                counts = np.full(rows, tokens // rows, np.int32)
                counts[: tokens % rows] += 1
                if 1 < counts.max() <= config.max_model_len:
                    yield batch_of(config, counts, counts, columns_of(rows))

    def _prompt(self, size: StepSize) -> Batch | None:
        """A step of this size; None if there can be none."""
        singles, tokens, prompts = size
        config = self._config
        singles = min(singles, config.max_num_seqs - prompts, config.max_num_batched_tokens - tokens)
        if not 1 < tokens // prompts <= config.max_model_len:
            return None
        if singles < 0 or size_of(singles, tokens, prompts, config.max_num_seqs) != size:
            return None
        counts = np.ones(singles + prompts, np.int32)
        counts[singles:] = tokens // prompts
        return batch_of(config, counts, counts, columns_of(len(counts)))
