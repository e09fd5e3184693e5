"""What the prefix cache on disk costs a step, and saves after a restart: the default model in this process.

    python benchmarks/prefix_store.py [MODEL]

Prints one JSON object: times of steps that decode four rows while requests end beside them, without and with a folder,
and the time to first token of a long prompt, computed and found on disk.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from octavo.config import DEFAULT_MODEL, EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

PROMPT = 1000


def build(model: str, folder: Path | None) -> Engine:
    where = str(folder) if folder else None
    return Engine.build(
        EngineOptions(model=model, max_model_len=2048, kv_cache_memory="1GiB", prefix_cache_dir=where)  # type: ignore[arg-type]
    )


def request(name: str, seed: int, length: int, answer: int) -> Request:
    prompt = [random.Random(seed * 10_000 + i).randrange(100, 40_000) for i in range(length)]
    return Request(name, prompt, SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0))


def decode_steps(engine: Engine, seed: int) -> list[float]:
    """Milliseconds of the steps in which four rows decode, after a long request beside them has let its blocks go."""
    for i in range(4):
        engine.add(request(f"stream{seed}-{i}", 4 * seed + i, 8, 70))
    engine.add(request(f"long{seed}", 100 + seed, PROMPT, 2))
    seconds, beside = [], True
    while engine.has_work():
        began = time.perf_counter()
        output = engine.step()
        if not beside and len(output.tokens) == 4:
            seconds.append(1000 * (time.perf_counter() - began))
        beside = beside and not any(name.startswith("long") and reason for name, _, _, reason, *_ in output.tokens)
    return seconds


def first_token(engine: Engine) -> float:
    """Milliseconds to the first token of a long prompt."""
    engine.add(request("again", 77, PROMPT, 1))
    began = time.perf_counter()
    while engine.has_work():
        engine.step()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL
    folder = Path(tempfile.mkdtemp())
    engines = {"none": build(model, None), "folder": build(model, folder)}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        first_token(engine)
        while engine.save_idle():
            pass
        engine.scheduler.blocks.reset_prefix_cache()
    for seed in range(6):  # in turn, so that both see the same machine
        for name, engine in engines.items():
            steps[name] += decode_steps(engine, seed)
    computed = first_token(engines["none"])
    engines["folder"].shutdown()
    engines["none"].shutdown()
    again = build(model, folder)
    found = first_token(again)
    result = {
        "model": model,
        "block_bytes": again.executor.block_bytes,
        "blocks_saved": engines["folder"].stats().blocks_saved,
        "blocks_loaded": again.stats().blocks_loaded,
        "first_token_computed_ms": round(computed, 1),
        "first_token_found_ms": round(found, 1),
        "hash_weights_ms": round(1000 * dict(again.timeline)["hash weights"], 1),
    }
    for name, values in steps.items():
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        result[name] = {"p50_ms": round(p50, 2), "p90_ms": round(p90, 2), "p99_ms": round(p99, 2)}
    again.shutdown()
    shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
