"""Any traffic through what stands around the model on a GPU: what is sent, what the first kernel makes of it in a step
that goes on, what the last publishes, and all of it in turns. Instead of a model, a paged cache of token ids."""

import hashlib
import random
from collections import Counter, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from octavo.batch import Batch, NextStep, StepResult
from octavo.config import RopeConfig
from octavo.engine.rows import FORK_STRIDE
from octavo.engine.scheduler import Scheduler
from octavo.errors import RequestError
from octavo.layers.rope import Rope
from octavo.request import Request
from octavo.runner import noise, sampler
from octavo.sampling_params import SamplingParams
from tests import interpreter
from tests.tiny_config import engine_config, model_config

pytestmark = interpreter.MARKS
CPU = torch.device("cpu")
VOCAB = 1000
STOPS = list(range(0, VOCAB, 40))


def number_of(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def token_of(seen, state, temperature, top_k):
    """What is drawn after tokens whose number is `seen`."""
    return number_of(seen, int(state) % 2**64, round(float(temperature), 3), int(top_k)) % VOCAB


def expected(prompt, params, fork):
    """Sample `fork` of an answer, computed without any cache."""
    tokens = list(prompt)
    seed = np.array([(params.seed + fork * FORK_STRIDE) % 2**64], np.uint64)
    for i in range(params.max_tokens):
        state = noise.states(seed, np.array([i], np.int32))[0]
        seen = number_of(tokens)
        if params.has_penalties:
            counts = dict.fromkeys(prompt, 0) | Counter(tokens[len(prompt) :])
            seen = number_of(seen, sorted(counts.items()))
        tokens.append(token_of(seen, state, params.temperature, params.top_k))
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


class PagedModel:
    """Hidden states are numbers of the tokens that each token sees in the cache; and so are logits."""

    def __init__(self, config, num_blocks, block_size):
        self.config = config
        self.device = CPU
        self.rope = Rope(config.rope, CPU)
        self.norm = SimpleNamespace(weight=torch.zeros(1))
        self.blocks = np.full((num_blocks, block_size), -1, np.int64)  # -1: nobody may read it

    def forward(self, ctx):
        from octavo.ops.triton import leading_singles

        given = (ctx.token_ids_T, ctx.positions_T, ctx.slots_T, ctx.seq_lens_R, ctx.block_tables_RM)
        token_ids, positions, slots, lengths, tables = (tensor.numpy() for tensor in given)
        cache, size = self.blocks.reshape(-1), self.blocks.shape[1]
        real = slots >= 0
        assert len(set(slots[real].tolist())) == real.sum(), "two tokens are written to one slot"
        cache[slots[real]] = token_ids[real]
        if ctx.ops.prefix is not None:
            self._check_shared(ctx.ops.prefix, lengths, tables)
        hidden_T1 = torch.full((len(token_ids), 1), -1, dtype=torch.int64)
        singles = leading_singles(ctx.query_start_host)
        assert (np.diff(ctx.query_start_R1[singles:].numpy()) >= 0).all() or singles == len(lengths)
        for row, length in enumerate(lengths.tolist()):
            # As in the kernels, where the host's arrays say no more than how many single rows there are.
            start, end = (row, row + 1) if row < singles else ctx.query_start_R1[row : row + 2].tolist()
            if length == 0 or start == end:
                continue
            at = np.arange(length)
            places = tables[row, at // size] * size + at % size
            seen = cache[places].tolist()
            assert -1 not in seen, "a row reads a slot that nobody wrote"
            assert (positions[start:end] == at[start - end :]).all()
            assert (slots[start:end] == places[start - end :]).all()
            for token in range(start, end):
                hidden_T1[token] = number_of(seen[: length - end + token + 1])
        return hidden_T1

    def _check_shared(self, prefix, lengths, tables):
        for start, count in zip(prefix.tile_start_L.tolist(), prefix.tile_rows_L.tolist(), strict=True):
            rows = slice(start, start + count)
            shared = prefix.lengths_R[rows].numpy()
            assert (shared == shared[:1]).all()
            assert (shared < lengths[rows]).all()
            common = tables[rows, : int(shared[0]) // self.blocks.shape[1] if count else 0]
            assert (common == common[:1]).all()

    def lm_head(self, hidden_S1, ctx):
        assert ctx.ops.finished
        return hidden_S1

    logits = lm_head


class NoOps:
    """The ops of a model that has none."""

    invariant = False
    may_fuse = True
    prefix = None

    def __init__(self, *given, singles=True):
        self.finished = False

    def sharing(self, prefix):
        ops = NoOps()
        ops.prefix = prefix
        return ops

    def finish(self):
        self.finished = True


def draw(logits_S1, asked, num_tokens, out_S):
    for i, seen in enumerate(logits_S1[:, 0].tolist()):
        out_S[i] = token_of(seen, asked.states_S[i], asked.temperature_S[i], asked.top_k_S[i])


def draw_cold(logits_S1, columns):
    states = noise.states(columns.seed, columns.counter)
    asked = zip(logits_S1[:, 0].tolist(), states, columns.temperature, columns.top_k, strict=True)
    return torch.tensor([token_of(*each) for each in asked])


def penalize(logits_S1, columns, before_S):
    for i, sample in enumerate(columns.penalty_sample.tolist()):
        part = slice(*columns.penalty_start[i : i + 2])
        counts = Counter(
            dict(zip(columns.penalty_token[part].tolist(), columns.penalty_count[part].tolist(), strict=True))
        )
        if (pending := int(columns.penalty_pending[i])) < 0:
            counts[int(before_S[~pending])] += 1
        logits_S1[sample] = number_of(int(logits_S1[sample]), sorted(counts.items()))


def logprobs(logits_E1, tokens_E, k):
    return sampler.Found(tokens_E[:, None], torch.zeros(len(tokens_E), 1), torch.ones(len(tokens_E)))


class Runner:
    """A `CudaRunner` whose tokens are looked at as late as there."""

    def __init__(self, config):
        from octavo.runner.cuda_runner import CudaForward

        self.model = PagedModel(config.model, config.num_blocks, config.block_size)
        cache = SimpleNamespace(k_PBKH=torch.zeros(config.num_blocks, config.block_size, 1, 1))
        self.forward = CudaForward(self.model, SimpleNamespace(layers=[cache]), config)
        self.continued = 0
        self._host = np.full((config.num_host_blocks, config.block_size), -1, np.int64)
        self._steps = deque()

    def submit(self, step, whole):
        from octavo.runner.cuda_runner import plain

        if isinstance(step, NextStep) and self.forward.can_go_on:
            self.continued += 1
            self._steps.append(self.forward.go_on(step))
            return
        batch = step if isinstance(step, Batch) else whole()
        self._move(batch)
        if plain(batch.sampling):
            self._steps.append(self.forward.draw(batch))
        else:
            tokens, _ = self.forward.draw_changed(batch, self.forward.hidden(batch))
            self._steps.append(tokens)

    def _move(self, batch):
        blocks = self.model.blocks
        for block, host in batch.swap_out:
            self._host[host] = blocks[block]
        for block, host in batch.swap_in:
            blocks[block] = self._host[host]
        for source, destination in batch.block_copies:
            blocks[destination] = blocks[source]

    def result(self):
        return StepResult(self._steps.popleft().copy())


class Traffic:
    """Requests that come, are aborted and preempted at any time, two steps ahead of what is seen."""

    def __init__(self, block_size, rng):
        self._rng = rng
        self._length = rng.choice([17, 40, 64])
        least, rows = -(-self._length // block_size), rng.choice([1, 2, 3, 5, 8])
        rope = RopeConfig(rotary_dim=8, scaling="dynamic", factor=2.0, original_max_position=rng.choice([20, 100]))
        config = engine_config(
            model_config(vocab_size=VOCAB, rope=rope),  # longer prompts have a stretch of their own
            block_size=block_size,
            num_blocks=rng.randint(least, 4 * least),
            max_model_len=self._length,
            max_num_seqs=rows,
            max_num_batched_tokens=rng.randint(rows, 70),
            enable_prefix_caching=rng.random() < 0.6,
            num_host_blocks=rng.choice([0, 5, 200]),
            preemption_mode=rng.choice(["swap", "recompute"]),
        )
        self.runner = Runner(config)
        self.runner.forward._prompts._max_tokens = rng.choice([5, 70])  # steps of more are no graphs
        self._calm = rng.random() < 0.5  # whether all only decode, for long
        self._scheduler = Scheduler(config)
        if rng.random() < 0.5:  # admit whatever fits this moment, so that somebody has to give way
            self._scheduler._fits_ahead = lambda state, owned_hits: True
        self._beginnings = [[rng.randrange(VOCAB) for _ in range(self._length)] for _ in range(3)]
        self._wanted = {}
        self._got = defaultdict(list)

    def run(self):
        for i in range(self._rng.randint(1, 10)):
            for _ in range(self._rng.randint(0, 6)):
                self._step()
            self._add(f"r{i}", i)
            if self._rng.random() < 0.2:
                self._abort(f"r{self._rng.randint(0, i)}")
        while self._scheduler.has_work():
            self._step()
        assert {name: tokens for name, tokens in self._wanted.items() if tokens} == self._got

    def _add(self, name, seed):
        rng = self._rng
        given = rng.randint(1, rng.choice([1, 6, self._length - 1]))
        prompt = self._beginnings[rng.randint(0, 2)][:given]
        room = self._length - given
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3, 8]),
            max_tokens=room if self._calm else rng.randint(1, room),
            seed=seed,
            temperature=1.0 if self._calm else rng.choice([1.0, 0.5, 1e-6]),  # the last one is too cold for the kernels
            top_k=rng.choice([0, 5]),
            stop_token_ids=[] if self._calm else rng.choice([[], [5], STOPS]),
            logprobs=None if self._calm else rng.choice([None] * 9 + [0]),
            presence_penalty=0.0 if self._calm else rng.choice([0.0] * 9 + [0.1]),
            ignore_eos=True,
        )
        try:
            self._scheduler.add(Request(name, prompt, params))
        except RequestError:  # so many do not fit
            return
        self._wanted |= {(name, fork): expected(prompt, params, fork) for fork in range(params.n)}

    def _abort(self, name):
        self._scheduler.abort(name)
        for key in self._wanted:
            if key[0] == name:
                self._wanted[key] = self._got.get(key, [])[:]

    def _step(self):
        scheduler = self._scheduler
        while scheduler.steps_under_way < 2 and (step := scheduler.schedule()):
            self.runner.submit(step, scheduler.whole)
        if scheduler.steps_under_way:
            for name, fork, token, *_ in scheduler.update(self.runner.result()).tokens:
                self._got[name, fork].append(token)
        scheduler.check()
        self.runner.model.blocks[[b for b in scheduler.blocks._free_queue if not scheduler.blocks._hash_of[b]]] = -1


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("shared_keys", [1, 256])
def test_any_traffic_ends_with_the_right_answers(without_a_gpu, monkeypatch, block_size, shared_keys):
    from octavo.runner import cuda_graphs, cuda_runner, prefix_groups, prompt_graphs

    for module, replaced in ((cuda_runner, (draw, penalize)), (sampler, (logprobs,))):
        for function in replaced:
            monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(sampler, "draw", draw_cold)
    monkeypatch.setattr(cuda_runner, "TritonOps", NoOps)
    monkeypatch.setattr(cuda_graphs, "FusedOps", NoOps)
    monkeypatch.setattr(cuda_runner, "between_ops", lambda model, caches: "")
    monkeypatch.setattr(cuda_graphs, "fits", lambda *shape: True)
    monkeypatch.setattr(prefix_groups, "_LEAST_ROWS", 2)
    monkeypatch.setattr(prefix_groups, "_LEAST_KEYS", shared_keys)
    rng, continued = random.Random(block_size + shared_keys), 0
    with torch.inference_mode():
        for _ in range(6):
            monkeypatch.setattr(cuda_graphs, "_UNSORTED", rng.choice([0, 32]))
            monkeypatch.setattr(prompt_graphs, "_PROMPTS", rng.choice([(1, 3), (4, 16, 64)]))
            traffic = Traffic(block_size, rng)
            traffic.run()
            continued += traffic.runner.continued
    assert continued > 20
    assert {len(key) for key in without_a_gpu} == {1, 3}, "steps with prompts and without"
