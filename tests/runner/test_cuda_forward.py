"""The GPU's forward pass on machines without one: its kernels in Triton's interpreter, a graph's replay as a call.

What only a GPU can show (streams, real graphs, steps ahead) is for `tests/gpu`.
"""

from collections import deque
from dataclasses import replace

import pytest
import torch

from octavo.batch import Batch, NextStep, StepResult
from octavo.engine.scheduler import Scheduler
from octavo.layers.mlp import GatedMLP
from octavo.models import read_config
from octavo.models.loader import load_model
from octavo.request import Request
from octavo.runner.kv_cache import KVCache, kv_torch_dtype
from octavo.runner.model_runner import ModelRunner
from octavo.sampling_params import SamplingParams
from tests import interpreter
from tests.steps import Row, Steps
from tests.tiny_config import engine_config
from tests.tiny_models import FolderCheckpoint, save_model

pytestmark = interpreter.MARKS
CPU = torch.device("cpu")


class GpuRunner:
    """The greedy part of a `CudaRunner`."""

    def __init__(self, model, config):
        from octavo.runner.cuda_runner import CudaForward

        dtype = kv_torch_dtype(config.kv_dtype)
        self.kv_cache = KVCache(config.model, config.num_blocks, config.block_size, dtype, CPU)
        self.forward = CudaForward(model, self.kv_cache, config)

    def run(self, step, whole=None):
        if isinstance(step, NextStep) and self.forward.can_go_on:
            return StepResult(self.forward.go_on(step).copy())
        return StepResult(self.forward.draw(step if isinstance(step, Batch) else whole()).copy())


class Whole:
    """A runner that keeps nothing of a step."""

    def __init__(self, runner):
        self._runner = runner

    def run(self, step, whole):
        return self._runner.run(step if isinstance(step, Batch) else whole())


@pytest.fixture(autouse=True)
def few_programs(without_a_gpu, monkeypatch):
    from octavo.ops.triton import decode

    monkeypatch.setattr(decode, "_PROGRAMS", 16)  # one after another they take their time


@pytest.mark.parametrize(("deterministic", "patience"), [(False, 0), (True, 0), (False, 1)])
def test_the_tokens_are_those_of_plain_torch(tmp_path, without_a_gpu, deterministic, patience):
    checkpoint = FolderCheckpoint(save_model(tmp_path, "Qwen3", head_dim=16))
    config = read_config(checkpoint.config)
    model = load_model(checkpoint, config, torch.float32, CPU)
    sizes = {"num_blocks": 40, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    options = engine_config(config, device="cuda", deterministic=deterministic, **sizes)
    cache = KVCache(config, options.num_blocks, options.block_size, torch.float32, CPU)
    found, on_gpu = [], GpuRunner(model, options)
    on_gpu.forward.be_patient(patience)
    for runner in (ModelRunner(model, cache), on_gpu):
        # A beginning in common is for tests of the kernel: it would take 256 tokens.
        rows = [Row([3 + (7 * i + k * k) % 150 for k in range(n)]) for i, n in enumerate((1, 20))]
        found.append(Steps(runner).generate(rows, 3, chunk=18))
    assert found[1] == found[0]
    if patience:  # the second of a kind is recorded, and what came once is known
        assert without_a_gpu
        assert on_gpu.forward.take_missed() is not None


def test_torch_between_the_ops_reads_what_was_computed(tmp_path, monkeypatch, caplog):
    """A router, say: with fused kernels it would read memory that nobody has written yet."""

    def routed(self, x, ctx):
        hidden = self.gate_up(x, ctx)
        chosen = torch.softmax(hidden[:, :8], dim=-1).topk(2).indices.float().mean(-1, keepdim=True)
        return self.down(ctx.ops.silu_mul(hidden) * (1 + chosen), ctx)

    monkeypatch.setattr(GatedMLP, "__call__", routed)
    checkpoint = FolderCheckpoint(save_model(tmp_path, "Llama"))
    config = read_config(checkpoint.config)
    model = load_model(checkpoint, config, torch.float32, CPU)
    options = engine_config(config, num_blocks=40, block_size=16, max_num_seqs=4, max_num_batched_tokens=64)
    cache = KVCache(config, options.num_blocks, options.block_size, torch.float32, CPU)
    found = []
    for runner in (ModelRunner(model, cache), GpuRunner(model, replace(options, device="cuda"))):
        rows = [Row([3 + (7 * i + k * k) % 150 for k in range(n)]) for i, n in enumerate((1, 20))]
        found.append(Steps(runner).generate(rows, 3, chunk=18))
    assert found[1] == found[0]
    assert "kernels are not fused, which is slower" in caplog.text
    assert "it computes torch.softmax of an op's result, between the ops" in caplog.text


def test_steps_with_and_without_prompts(tmp_path, without_a_gpu):
    """Graphs go on from each other, prompts join while others draw, and come in parts; sizes come again, and some
    are forgotten in between."""
    checkpoint = FolderCheckpoint(save_model(tmp_path, "Qwen3", head_dim=16))
    config = read_config(checkpoint.config)
    model = load_model(checkpoint, config, torch.float32, CPU)
    options = replace(
        engine_config(config, num_blocks=40, block_size=16, max_num_seqs=4, max_num_batched_tokens=26), device="cuda"
    )
    cache = KVCache(config, options.num_blocks, options.block_size, torch.float32, CPU)

    def answers(runner, depth):
        scheduler, steps, found, continued = Scheduler(options), deque(), {}, 0
        # The first fills its block after two steps, the last ends before the others.
        for i, (given, wanted) in enumerate(((14, 14), (20, 14), (5, 11), (30, 6), (9, 5))):
            prompt = [3 + (7 * i + k * k) % 150 for k in range(given)]
            scheduler.add(Request(f"r{i}", prompt, SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)))
        while scheduler.has_work():
            while len(steps) < depth and (step := scheduler.schedule()):
                continued += isinstance(step, NextStep)
                steps.append(runner.run(step, scheduler.whole))
            for name, _, token, *_ in scheduler.update(steps.popleft()).tokens:
                found.setdefault(name, []).append(token)
        assert continued >= 3
        return found

    assert answers(GpuRunner(model, options), 2) == answers(Whole(ModelRunner(model, cache)), 1)
    assert len([key for key in without_a_gpu if len(key) == 1]) > 2, "steps with prompts"


def test_the_largest_steps_touch_no_block(tmp_path):
    from octavo.runner.cuda_memory import largest_chunks, largest_decode, largest_prompt

    checkpoint = FolderCheckpoint(save_model(tmp_path, "Llama"))
    config = read_config(checkpoint.config)
    options = engine_config(config, num_blocks=1, block_size=16, max_num_seqs=4, max_num_batched_tokens=34)
    runner = GpuRunner(load_model(checkpoint, config, torch.float32, CPU), replace(options, device="cuda"))
    chunks = largest_chunks(options)
    tokens, found = runner.forward.draw_changed(chunks, runner.forward.hidden(chunks))
    assert chunks.num_tokens == 34
    assert len(tokens) == 4
    assert found[0].logprobs_EK.shape == (4, 21)
    for largest in (largest_prompt, largest_decode):
        assert len(runner.run(largest(options)).token_ids) == 4
    assert not any(cache.k_PBKH.any() or cache.v_PBKH.any() for cache in runner.kv_cache.layers)


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 256, 700])
@pytest.mark.parametrize("more_tokens", [0, 1, 30, 10_000])
def test_no_graph_has_more_rows_than_the_one_that_is_measured(monkeypatch, rows, more_tokens):
    monkeypatch.undo()  # the real sizes
    from octavo.ops.triton import leading_singles
    from octavo.runner.cuda_memory import largest_prompt
    from octavo.runner.prompt_graphs import most_rows, most_tokens, size_of

    config = engine_config(max_num_seqs=rows, max_num_batched_tokens=rows + more_tokens, max_model_len=40)
    batch = largest_prompt(config)
    assert batch.num_tokens <= config.max_num_batched_tokens
    assert batch.seq_lens.max() <= config.max_model_len
    if rows + more_tokens == 1:
        return  # no step has a prompt of two tokens
    singles = leading_singles(batch.query_start)
    tokens = batch.num_tokens - singles
    assert tokens <= most_tokens(config)
    measured = size_of(singles, tokens, batch.num_rows - singles, rows)
    assert measured is not None
    for singles in range(rows):
        # A step of so many other rows, or of one that draws so many samples.
        other = size_of(singles, 2, min(rows, config.max_num_batched_tokens - 1) - singles, rows)
        assert other is None or other[0] + other[2] <= measured[0] + measured[2] <= most_rows(rows)
