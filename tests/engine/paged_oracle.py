"""An executor without a model: it keeps tokens in a paged cache and draws a hash of what a row can see there.

Because the drawn token depends on every token read through the block table, any mistake in tables, slots, sharing,
copying, swapping or recomputing shows as a different answer than `expected` gives, which never saw a block.
"""

import hashlib
import random
from collections import deque
from collections.abc import Iterable

import numpy as np

from octavo.batch import Batch, LogprobColumns, StepResult
from octavo.config import EngineConfig
from octavo.engine.beam_search import BeamSearch
from octavo.sampling_params import SamplingParams
from tests import tiny_config

VOCAB = 1000
EOS = 7


def draw(tokens: list[int], seed: int, counter: int) -> int:
    """The token that follows `tokens`."""
    text = repr((tokens, seed, counter)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % VOCAB


def expected(prompt: list[int], max_tokens: int, seed: int) -> list[int]:
    """The answer to `prompt`, computed without any cache."""
    tokens = list(prompt)
    for i in range(max_tokens):
        tokens.append(draw(tokens, seed, i))
    return tokens[len(prompt) :]


def likeliest(tokens: list[int], k: int) -> tuple[list[int], list[float]]:
    """The `k` likeliest tokens after `tokens` with their logprobs, in falling order; EOS is among them now and then."""
    rng = random.Random(repr(tokens))
    chosen = rng.sample(range(10, VOCAB), k - 1)
    chosen.insert(rng.randrange(3 * k) % k if rng.random() < 0.6 else k - 1, EOS)
    return chosen, sorted((-3 * rng.random() for _ in range(k)), reverse=True)


def expected_beams(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """(answer, score) of each of the n best, from a search over whole token lists."""
    search = BeamSearch(params, frozenset((EOS,)), params.max_tokens or 0)
    beams = [list(prompt)]
    while not search.done:
        for i, beam in enumerate(beams):
            tokens, values = likeliest(beam, search.num_candidates)
            search.put(i, ([0, *tokens], [0.0, *values], 1))
        beams = [[*beams[parent], token] for parent, token in search.advance()]
    return [([link.token for link in answer.end.chain()], answer.score) for answer in search.answers()]


class PagedOracle:
    """The Executor protocol over `num_blocks` blocks of token ids; slots without content hold -1."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0):
        self.block_size = block_size
        self.cache = np.full(num_blocks * block_size, -1, np.int64)
        self.host = np.full((num_host_blocks, block_size), -1, np.int64)
        self.results: deque[StepResult] = deque()
        self.batches: list[Batch] = []
        self.drawn: list[int] = []  # by the last step

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)
        token_ids = [token if token >= 0 else self.drawn[~token] for token in batch.token_ids.tolist()]
        blocks = self.cache.reshape(-1, self.block_size)
        self.swap(batch.swap_out, batch.swap_in)
        for source, destination in batch.block_copies:
            blocks[destination] = blocks[source]
        assert len(set(batch.slots.tolist())) == batch.num_tokens, "two tokens are written to one slot"
        self.cache[batch.slots] = token_ids
        rows = np.searchsorted(batch.query_start, batch.sample_index, side="right") - 1
        drawn = []
        for i, row in enumerate(rows):
            seen = self.read(batch, int(row), int(batch.positions[batch.sample_index[i]]) + 1)
            drawn.append(draw(seen, int(batch.sampling.seed[i]), int(batch.sampling.counter[i])))
        self.drawn = drawn
        prompt_logprobs = None
        if batch.prompt_logprobs is not None:
            targets = batch.prompt_logprobs.target
            prompt_logprobs = LogprobColumns(
                targets[:, None], -targets[:, None].astype(np.float32), np.ones(len(targets), np.int32)
            )
        self.results.append(StepResult(np.array(drawn, np.int32), self.logprobs(batch, rows), prompt_logprobs))

    def logprobs(self, batch: Batch, rows: np.ndarray) -> LogprobColumns | None:
        """The likeliest tokens of the samples that ask for any, in columns 1 and on."""
        k = int(batch.sampling.num_logprobs.max(initial=-1))
        if k < 1:
            return None
        found = LogprobColumns(
            np.zeros((len(rows), 1 + k), np.int32), np.zeros((len(rows), 1 + k)), np.ones(len(rows), np.int32)
        )
        for i, row in enumerate(rows):
            if (wanted := int(batch.sampling.num_logprobs[i])) > 0:
                seen = self.read(batch, int(row), int(batch.positions[batch.sample_index[i]]) + 1)
                tokens, values = likeliest(seen, wanted)
                found.token_ids[i, 1 : 1 + wanted], found.logprobs[i, 1 : 1 + wanted] = tokens, values
        return found

    def swap(self, swap_out: Iterable[tuple[int, int]], swap_in: Iterable[tuple[int, int]]) -> None:
        """Moves contents between blocks and host blocks."""
        blocks = self.cache.reshape(-1, self.block_size)
        for block, host in swap_out:
            self.host[host] = blocks[block]
        for block, host in swap_in:
            blocks[block] = self.host[host]

    def poison(self, blocks: list[int], host_blocks: list[int]) -> None:
        """Destroys what nobody may read any more."""
        self.cache.reshape(-1, self.block_size)[blocks] = -1
        self.host[host_blocks] = -1

    def read(self, batch: Batch, row: int, length: int) -> list[int]:
        table = batch.block_tables[row]
        slots = [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(length)]
        seen = self.cache[slots].tolist()
        assert -1 not in seen, "a row reads a slot that nobody wrote"
        return seen

    def result(self) -> StepResult:
        return self.results.popleft()

    def shutdown(self) -> None:
        pass


def engine_config(**changes: object) -> EngineConfig:
    return tiny_config.engine_config(tiny_config.model_config(vocab_size=VOCAB, eos_token_ids=(EOS,)), **changes)
