"""A scheduler and the paged oracle, stepped by hand."""

import random
from collections import defaultdict
from dataclasses import astuple, replace

import numpy as np
from paged_oracle import PagedOracle, engine_config

from octavo.batch import Batch, NextStep
from octavo.engine.scheduler import Scheduler
from octavo.engine.state import Plan
from octavo.request import Request
from octavo.sampling_params import SamplingParams


class Bench:
    """A scheduler and an oracle, stepped by hand, with every invariant checked after every step.

    `depth` steps are scheduled before the first one's result is looked at.
    """

    def __init__(self, *, eager=False, depth=1, **changes):
        self.depth = depth
        self.continued = 0  # steps that were told as a `NextStep`
        self.config = engine_config(**changes)
        self.scheduler = Scheduler(self.config)
        if eager:  # admit whatever fits this moment, so that preemption is certain
            self.scheduler._fits_ahead = lambda state, owned_hits: True
        self.oracle = PagedOracle(self.config.num_blocks, self.config.block_size, self.config.num_host_blocks)
        self.answers = defaultdict(list)
        self.reasons = {}
        self.prompt_logprobs = defaultdict(dict)
        self.cached = {}
        self.scores = {}

    def add(self, name, prompt, *, priority=0, salt=None, bad_words=(), **params):
        params = {"max_tokens": 8, "ignore_eos": True, "seed": 1} | params
        request = Request(name, list(prompt), SamplingParams(**params), priority, salt, [list(w) for w in bad_words])
        self.scheduler.add(request)
        return request

    def step(self):
        while self.scheduler.steps_under_way < self.depth and (step := self.scheduler.schedule()):
            batch = step if isinstance(step, Batch) else self.scheduler.whole()
            assert batch.num_tokens <= self.config.max_num_batched_tokens
            assert batch.num_rows <= self.config.max_num_seqs
            self.scheduler.check()
            if self.scheduler.steps_under_way == 1:
                assert (batch.token_ids >= 0).all(), "a token is unknown that has been seen"
            if isinstance(step, NextStep):
                self.continued += 1
                check_next(step, batch, self.oracle.batches[-1], self.oracle.drawn, self.config.block_size)
            self.oracle.submit(batch)
        if not self.scheduler.steps_under_way:
            return None
        batch = self.oracle.batches[-1]
        output = self.scheduler.update(self.oracle.result())
        self.scheduler.check()
        self.poison()
        self.check_counts()
        for name, index, _, score in output.beam_scores:
            self.scores[name, index] = score
        for name, index, token, reason, stop, _ in output.tokens:
            self.answers[name, index].append(token)
            if reason:
                self.reasons[name, index] = (reason, stop)
        for name, start, entries in output.prompt_logprobs:
            for i, entry in enumerate(entries):
                self.prompt_logprobs[name][start + i] = entry
        for name, _, cached in output.started:
            self.cached[name] = cached
        return batch

    def preempt(self):
        """Preempts the only running request, its copies made at once."""
        (state,) = self.scheduler._requests.running
        plan = Plan(budget=0)
        self.scheduler._preempt(state, plan)
        self.oracle.swap(plan.swap_out, [])
        self.poison()
        self.scheduler.check()
        return state

    def check_counts(self):
        """What arrays say of all who run is what walking over their sequences says, once these are up to date."""
        requests = self.scheduler._requests
        if not requests.running:
            return
        tokens, growth = requests.exclusive_tokens(), np.stack(requests.growth(), axis=1).tolist()
        walked = []
        for state in requests.running:
            copies = [replace(seq, token_ids=list(seq.token_ids)) for seq in state.sequences]
            for seq in copies if state.decoding else ():
                requests.decoding._write_back(seq)
            assert tokens[state] == requests.blocks.computed_tokens(copies, exclusive=True)
            walked += replace(state, sequences=copies).growth([len(s.block_table) - s.num_borrowed for s in copies])
        assert sorted(map(tuple, growth)) == sorted(walked)

    def poison(self):
        """Nobody may rely on what lies in a block that is free."""
        blocks, swap = self.scheduler.blocks, self.scheduler.swap
        free = [block for block in blocks._free_queue if blocks._hash_of[block] is None]
        self.oracle.poison(free, swap._free)

    def run(self, limit=10_000):
        for _ in range(limit):
            if self.step() is None:
                assert not self.scheduler.has_work()
                assert self.scheduler.blocks.num_owned == self.scheduler.swap.num_used == 0
                return self
        raise AssertionError("the scheduler does not come to an end")


def check_next(step: NextStep, whole: Batch, before: Batch, drawn: list[int], block_size: int) -> None:
    """Asserts that `whole` is what a device makes of `step` that has kept the step `before` and what that has drawn."""
    rows, positions = np.arange(before.num_rows), before.positions + 1
    tables = np.pad(before.block_tables, ((0, 0), (0, 1)))
    tables[step.rows, positions[step.rows] // block_size] = step.blocks
    tokens = [token if token >= 0 else drawn[~token] for token in whole.token_ids.tolist()]
    assert tokens == drawn
    assert (whole.positions == positions).all()
    assert (whole.seq_lens == before.seq_lens + 1).all()
    assert (whole.slots == tables[rows, positions // block_size] * block_size + positions % block_size).all()
    for row, length in enumerate(-(-whole.seq_lens // block_size)):
        assert (whole.block_tables[row, :length] == tables[row, :length]).all()
    assert (whole.query_start == before.query_start).all()
    assert (whole.sample_index == rows).all()
    sampling = replace(before.sampling, counter=before.sampling.counter + 1)
    assert all(map(np.array_equal, astuple(whole.sampling), astuple(sampling)))
    assert not any(map(len, (whole.block_copies, whole.swap_out, whole.swap_in, whole.loaded_blocks)))


def prompt_of(length, seed=0):
    return [random.Random(seed).randrange(10, 1000) for _ in range(length)]
