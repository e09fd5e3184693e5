"""What is recorded before requests come is what they then need, and what was missed is recorded when nobody waits."""

from dataclasses import replace

import numpy as np
import pytest

from octavo.batch import Batch
from octavo.ops.triton import leading_singles
from octavo.runner.cuda_graphs import DecodeKind, Missed, bucket_of, buckets
from octavo.runner.prompt_graphs import most_tokens, size_of, sizes
from octavo.runner.warm_up import WarmUp
from octavo.step_layout import StepSize
from tests.tiny_config import engine_config

CONFIG = replace(
    engine_config(max_model_len=4096, max_num_seqs=40, max_num_batched_tokens=2048), device="cuda", warm_up="quick"
)


class Forward:
    def __init__(self):
        self.patience, self.missed = 0, []

    def be_patient(self, times: int) -> None:
        self.patience = times

    def take_missed(self):
        return self.missed.pop() if self.missed else None


class Runner:
    """Notes what is submitted, by the kinds that graphs are recorded for."""

    def __init__(self):
        self.forward = Forward()
        self.kinds: list[DecodeKind | StepSize] = []
        self.patience: list[int] = []

    def start(self, batch: Batch) -> "Runner":
        assert (batch.slots == -1).all(), "nothing is written"
        self.patience.append(self.forward.patience)
        singles = leading_singles(batch.query_start)
        if singles == batch.num_rows:
            shared = bool(len(batch.seq_lens) > 1 and (batch.seq_lens > 1).all())
            self.kinds.append(DecodeKind(bucket_of(batch.num_rows), shared, batch.sampling.only_draws))
        else:
            size = size_of(singles, batch.num_tokens - singles, batch.num_rows - singles, CONFIG.max_num_seqs)
            assert size is not None
            self.kinds.append(size)
        return self

    def result(self) -> None:
        pass


def recorded(**changes) -> Runner:
    runner = Runner()
    WarmUp(runner, replace(CONFIG, **changes)).run()
    return runner


def test_steps_of_usual_loads_are_recorded():
    kinds = recorded().kinds
    assert len(set(kinds)) == len(kinds), "each once"
    assert kinds[0] == DecodeKind(1, False, True), "what a first request needs comes first"
    needed: set[DecodeKind | StepSize] = set()
    for rows in range(1, CONFIG.max_num_seqs + 1):
        needed |= {DecodeKind(bucket_of(rows), False, draws) for draws in (True, False)}
        if rows > 1:
            needed.add(DecodeKind(bucket_of(rows), True, True))
    for singles in range(CONFIG.max_num_seqs - 3):
        for tokens in range(1, min(1024, most_tokens(CONFIG)) + 1, 7):
            for prompts in (1, 3, 4):
                if singles + prompts <= CONFIG.max_num_seqs:
                    needed.add(size_of(singles, tokens, prompts, CONFIG.max_num_seqs))
    assert needed - set(kinds) == set()


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 300])
def test_any_number_of_rows(rows: int):
    found = recorded(max_num_seqs=rows).kinds
    assert {kind.rows for kind in found if isinstance(kind, DecodeKind)} == {
        bucket_of(count) for count in buckets(rows)
    }


def test_none_and_full():
    assert recorded(warm_up="none").kinds == []
    quick, full = recorded().kinds, recorded(warm_up="full").kinds
    assert full[: len(quick)] == quick
    assert set(full) - set(quick)
    assert {kind for kind in full if isinstance(kind, StepSize)} <= set(sizes(CONFIG))


def test_what_was_missed_is_recorded_when_nobody_waits():
    runner = Runner()
    warm_up = WarmUp(runner, CONFIG)
    assert warm_up.one_more() is False
    warm_up.run()
    patient = runner.forward.patience
    assert patient > 0
    assert set(runner.patience) == {0}, "every step of the warm-up is recorded"
    runner.forward.missed = [StepSize(16, 1024, 16), DecodeKind(24, True, True), DecodeKind(8, False, False)]
    runner.kinds.clear()
    while warm_up.one_more():
        assert runner.forward.patience == patient
    assert runner.kinds == [DecodeKind(8, False, False), DecodeKind(24, True, True), StepSize(16, 1024, 16)]


def test_patience():
    missed: Missed[str] = Missed()
    assert missed.waits("a") is False
    missed.patience = 2
    assert [missed.waits("a") for _ in range(4)] == [True, True, False, True]
    assert [missed.waits("b") for _ in range(2)] == [True, True]
    assert [missed.take() for _ in range(3)] == ["b", "a", None]
    assert np.all([missed.waits("b") for _ in range(2)])
