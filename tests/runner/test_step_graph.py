"""The recorded step against the model's own code op by op, for every family, and what cannot be recorded."""

import numpy as np
import pytest
import torch

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineOptions
from octavo.kernels import library
from octavo.layers.mlp import GatedMLP
from octavo.models import read_model
from octavo.models.loader import load_model
from octavo.ops.symbol import NotRecordableError
from octavo.runner.build import build_executor
from octavo.runner.kernel_cache import KernelCache
from octavo.runner.kv_cache import KVCache
from octavo.runner.model_runner import ModelRunner
from octavo.runner.step_graph import StepGraph
from tests.builds import choose, each_build, needs_kernels
from tests.steps import Row, Steps
from tests.tiny_models import save_model, write_tiny_qwen_v1
from tests.tolerances import assert_logits_equal

pytestmark = needs_kernels

FAMILIES = {
    "llama": lambda path: save_model(path, "Llama", attention_bias=True, mlp_bias=True),
    "mistral": lambda path: save_model(path, "Mistral", sliding_window=20, head_dim=32),
    "qwen2": lambda path: save_model(path, "Qwen2"),
    "qwen3": lambda path: save_model(path, "Qwen3", head_dim=32),
    "qwen": write_tiny_qwen_v1,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return FAMILIES[request.param](path) or path


def graph_runner(folder, **options):
    options = {
        "model": str(folder),
        "device": "cpu",
        "kv_cache_memory": "4MiB",
        "max_model_len": 128,
        "dtype": "float32",
    } | options
    executor, config, *_ = build_executor(EngineOptions(**options))
    return executor.runner, config


def plain_runner(folder, block_size=16):
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, read_model(checkpoint), torch.float32, torch.device("cpu"))
    cache = KVCache(model.config, 64, block_size, torch.float32, torch.device("cpu"))
    return ModelRunner(model, cache)


def logits_of(runner, row_lens, chunks):
    """Logits after every token of rows of random tokens, computed in `chunks` steps, a piece of each row a step."""
    rng = np.random.default_rng(7)
    rows = [Row(rng.integers(3, 150, length).tolist()) for length in row_lens]
    steps = Steps(runner)
    found = []
    with torch.inference_mode():
        for _ in range(chunks):
            work = [(row, -(-len(row.token_ids) // chunks)) for row in rows]
            work = [(row, min(n, len(row.token_ids) - row.num_computed)) for row, n in work]
            batch = steps.batch([(row, n) for row, n in work if n])
            found.append(torch.as_tensor(runner.forward.logits(runner.forward.hidden(batch))).clone())
    return torch.cat(found)


@each_build
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_same_logits_as_op_by_op(folder, chunks, build, monkeypatch):
    choose(monkeypatch, build)
    runner, config = graph_runner(folder)
    assert config.weights == "float32"
    assert isinstance(runner.forward, StepGraph)
    found, wanted = (logits_of(made, (40, 3, 90), chunks) for made in (runner, plain_runner(folder)))
    assert_logits_equal(found, wanted, runner.model.config)


@each_build
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"dtype": "bfloat16"}, 0.05),
        ({"quantize": "int8"}, 0.1),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, 0.05),
        ({"kv_cache_dtype": "int8"}, 0.1),
    ],
    ids=str,
)
def test_fewer_bits_stay_near(folder, options, most, build, monkeypatch):
    choose(monkeypatch, build)
    runner, config = graph_runner(folder, **({"dtype": "auto"} | options))
    assert config.weights == options.get("quantize", options.get("dtype", "bfloat16"))
    assert config.kv_dtype == options.get("kv_cache_dtype", "bfloat16")
    found, wanted = (logits_of(made, (40, 3, 90), 1) for made in (runner, plain_runner(folder)))
    seen = torch.isfinite(wanted)
    assert float((found - wanted)[seen].norm() / wanted[seen].norm()) < most


def record(folder):
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, read_model(checkpoint), torch.float32, torch.device("cpu"))
    cache = KernelCache(model.config, 8, 16, "float32")
    return StepGraph(model, cache, library.KernelThreads(library.load(), 1), 64, 128)


def test_arithmetic_between_the_ops_is_noticed(folder, monkeypatch):
    record(folder)
    monkeypatch.setattr(
        GatedMLP, "__call__", lambda self, x, ctx: self.down(ctx.ops.silu_mul(self.gate_up(x, ctx)) * 2, ctx)
    )
    with pytest.raises(NotRecordableError, match="uses __mul__ on an op's result"):
        record(folder)


def test_what_cannot_be_recorded_still_runs(folder, monkeypatch, caplog):
    def doubled(self, x, ctx):
        return self.down(ctx.ops.silu_mul(self.gate_up(x, ctx)) * 2, ctx)

    monkeypatch.setattr(GatedMLP, "__call__", doubled)
    runner, _ = graph_runner(folder)
    assert "cannot be recorded" in caplog.text
    found, wanted = (logits_of(made, (40, 3), 2) for made in (runner, plain_runner(folder)))
    assert_logits_equal(found, wanted, runner.model.config)


def test_writing_into_a_result_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(
        GatedMLP, "__call__", lambda self, x, ctx: self.down(ctx.ops.silu_mul(self.gate_up(x, ctx)).mul_(2), ctx)
    )
    with pytest.raises(NotRecordableError, match="uses mul_ on an op's result"):
        record(folder)


def test_what_torch_computes_between_the_ops_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(GatedMLP, "__call__", lambda self, x, ctx: self.down(torch.relu(self.gate_up(x, ctx)), ctx))
    with pytest.raises(NotRecordableError, match=r"torch\.relu"):
        record(folder)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"block_size": 8}, "block_size is 8"), ({"dtype": "float16"}, "dtype is float16")],
)
def test_what_the_kernels_cannot_do_runs_on_torch_and_says_so(folder, caplog, options, why):
    runner, config = graph_runner(folder, **options)
    assert config.weights == "plain"
    assert not isinstance(runner.forward, StepGraph)
    assert why in caplog.text
