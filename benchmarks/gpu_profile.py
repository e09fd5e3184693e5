"""Kernel times of single steps on a GPU, beside the time that the step's bytes or products would take at the least.

Used by `benchmarks/gpu.py --profile`. A step's limit counts weights and keys read once at `BYTES` a second, or the
products of a prompt's tokens at `FLOPS`: what this GPU was measured to do with copies and with large matrices.
"""

import time
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import torch

from octavo.config import ModelConfig
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

BYTES = 3.03e12
FLOPS = 782e12
_STEPS = 8
_WANTED = 256  # tokens of a row: more than it draws until it has been measured


def profile(engine: Engine, name: str, folder: Path) -> None:
    """Writes a table for decoding 1 and 256 rows and for a step full of prompts."""
    model = engine.config.model
    lines = [f"# {name} on {torch.cuda.get_device_name()}, torch {torch.__version__}"]
    for rows, given in ((1, 256), (8, 256), (256, 768)):
        rows = min(rows, _room(engine, given))
        for i in range(rows):
            _add(engine, f"profile-{rows}-{i}", given, _WANTED)
        _settle(engine, rows)
        seconds, kernels = _record(engine)
        weights = 2 * (model.num_parameters() - model.vocab_size * model.hidden_size * (not model.tie_word_embeddings))
        limit = (weights + rows * given * model.kv_bytes_per_token(engine.config.dtype)) / BYTES
        lines += _table(f"decode, {rows} rows of about {given} tokens", seconds, kernels, limit)
        for i in range(rows):
            engine.abort(f"profile-{rows}-{i}")
        _drain(engine)
    rows = min(256, _room(engine, 2176))
    for i in range(rows):
        _add(engine, f"profile-shared-{i}", 2176, _WANTED, common=2048)
    _settle(engine, rows)
    seconds, kernels = _record(engine)
    limit = (weights + (2048 + rows * 160) * model.kv_bytes_per_token(engine.config.dtype)) / BYTES
    lines += _table(f"decode, {rows} rows of about 2,208 tokens, 2,048 of them shared", seconds, kernels, limit)
    for i in range(rows):
        engine.abort(f"profile-shared-{i}")
    _drain(engine)
    for i in range(2 * _STEPS + 6):
        _add(engine, f"profile-prompt-{i}", 4096, 1)
    engine.step()
    seconds, kernels = _record(engine)
    limit = _prefill_flops(model, 2, 4096) / FLOPS
    lines += _table("prefill, 2 prompts of 4,096 tokens", seconds, kernels, limit)
    _drain(engine)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu-profile-{name}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _room(engine: Engine, given: int) -> int:
    """Rows that are let in together: the scheduler keeps room for all that they will draw."""
    return engine.config.num_blocks * engine.config.block_size // (given + _WANTED)


def _add(engine: Engine, request_id: str, given: int, wanted: int, common: int = 0) -> None:
    random = Random(request_id)
    prompt = [7919 * i % 10_000 for i in range(common)] + [random.randrange(10_000) for _ in range(given - common)]
    engine.add(Request(request_id, prompt, SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=wanted)))


def _settle(engine: Engine, rows: int) -> None:
    """Steps until every row has decoded, so that what is recorded once has been."""
    seen: set[str] = set()
    while len(seen) < rows:
        seen |= {token[0] for token in engine.step().tokens}
    for _ in range(12):
        engine.step()


def _drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def _record(engine: Engine) -> tuple[float, dict[str, tuple[int, float]]]:
    """Seconds of a step as it runs, and each kernel's launches and microseconds in it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_STEPS):
        engine.step()
    seconds = (time.perf_counter() - began) / _STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(_STEPS // 2):
            engine.step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    events: Any = recorded.events()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += 1
            found[event.name][1] += event.device_time
    # A step more was under way when the recording ended.
    return seconds, {name: (int(n), us) for name, (n, us) in found.items()}


def _table(title: str, seconds: float, kernels: dict[str, tuple[int, float]], limit: float) -> list[str]:
    total = sum(us for _, us in kernels.values()) or 1.0
    lines = ["", f"## {title}: {1e3 * seconds:.3f} ms a step; limit {1e3 * limit:.3f} ms, {limit / seconds:.0%} of it"]
    lines.append(f"{'us':>10} {'share':>6} {'launches':>9}  kernel (over {_STEPS // 2} or {_STEPS // 2 + 1} steps)")
    for name, (count, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:14]:
        lines.append(f"{us:>10.1f} {us / total:>6.1%} {count:>9}  {name[:90]}")
    return lines


def _prefill_flops(model: ModelConfig, prompts: int, tokens: int) -> float:
    tables = 1 if model.tie_word_embeddings else 2
    linear = model.num_parameters() - tables * model.vocab_size * model.hidden_size
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * tokens * (tokens + 1) / 2
    return prompts * (2 * tokens * linear + attention)
