"""Octavo on one GPU: the workloads that other engines were measured with, on models of random weights.

    python benchmarks/gpu.py --models qwen3-0.6b,qwen3-8b --work decode1,mixed256 --out benchmarks/results/gpu.jsonl

Token ids are drawn from fixed seeds, so every engine can be given the same; temperature 0.8, EOS ignored, no text. Each
run is a row of the file; the table at the end shows the last repetition. Memory is what the driver says is in use.
"""

import argparse
import gc
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

Work = tuple[list[list[int]], list[int]]  # prompts, tokens to generate
_HIGH = 10_000

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "qwen-7b": {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "intermediate_size": 22016,  # of w1 and w2 together
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 8192,
        "max_position_embeddings": 32768,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
        "bf16": True,
    },
}


def mixed(count: int, low: int, high: int) -> Work:
    random = Random(0)
    prompts = [[random.randint(0, _HIGH) for _ in range(random.randint(low, high))] for _ in range(count)]
    return prompts, [random.randint(low, high) for _ in range(count)]


def fixed(count: int, given: int, wanted: int, seed: int = 1) -> Work:
    random = Random(seed)
    return [[random.randint(0, _HIGH) for _ in range(given)] for _ in range(count)], [wanted] * count


def shared(count: int, prefix: int, own: int, wanted: int) -> Work:
    random = Random(2)
    first = [random.randint(0, _HIGH) for _ in range(prefix)]
    return [first + [random.randint(0, _HIGH) for _ in range(own)] for _ in range(count)], [wanted] * count


WORKS: dict[str, Callable[[], Work]] = {
    "decode1": lambda: fixed(1, 128, 512),
    "decode8": lambda: fixed(8, 128, 512),
    "mixed256": lambda: mixed(256, 100, 1024),
    "in1024out128x512": lambda: fixed(512, 1024, 128),
    "shared2048x256": lambda: shared(256, 2048, 128, 128),
    "prefill": lambda: fixed(64, 4096, 1),
}


class MemoryWatch:
    """Peak and mean of the GPU memory in use while it is open, in GiB, read twenty times a second."""

    def __enter__(self) -> "MemoryWatch":
        self._used: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        import torch

        while True:
            free, total = torch.cuda.mem_get_info()
            self._used.append(total - free)
            if self._stop.wait(0.05):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak, self.mean = max(self._used) / 2**30, sum(self._used) / len(self._used) / 2**30


class HostClock:
    """Microseconds a step that the host spends in the parts of a step; "wait" is for the device."""

    def __init__(self, engine: Engine):
        self._seconds: dict[str, list[float]] = {part: [] for part in ("schedule", "submit", "wait", "update")}
        scheduler, executor = engine.scheduler, engine.executor
        self._places = (
            (scheduler, "schedule", "schedule"),
            (executor, "submit", "submit"),
            (executor, "result", "wait"),
            (scheduler, "update", "update"),
        )

    def __enter__(self) -> "HostClock":
        for owner, method, part in self._places:
            setattr(owner, method, self._timed(getattr(owner, method), part))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, method, _part in self._places:
            delattr(owner, method)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            self._seconds[part].append(time.perf_counter() - began)
            return result

        return timed

    def row(self) -> dict[str, int]:
        steps = max(1, len(self._seconds["update"]))
        return {f"{part}_us": round(1e6 * sum(times) / steps) for part, times in self._seconds.items()}

    def medians(self) -> dict[str, float]:
        return {part: 1e6 * median(times) for part, times in self._seconds.items()}


def generate(engine: Engine, work: Work, name: str) -> float:
    """Seconds for the whole of `work`, from the first request to the last token."""
    prompts, lengths = work
    engine.scheduler.blocks.reset_prefix_cache()
    began = time.perf_counter()
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=length)
        engine.add(Request(f"{name}-{i}", prompt, params))
    count = 0
    while engine.has_work():
        count += len(engine.step().tokens)
    seconds = time.perf_counter() - began
    assert count == sum(lengths), f"{count} tokens came instead of {sum(lengths)}"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen3-0.6b,qwen3-8b")
    parser.add_argument("--work", default=",".join(WORKS))
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of the engine, as a JSON object")
    parser.add_argument("--start", default="start", help="name of the start's row: start_cold or start_warm")
    parser.add_argument("--commit", default="", help="commit, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    parser.add_argument("--profile", type=Path, help="folder for kernel times of a decode and a prefill step")
    given = parser.parse_args()

    began = time.perf_counter()
    import torch

    imported = time.perf_counter() - began
    commit = (
        given.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    stamp = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **({"engine": given.engine} if given.engine else {}),
    }
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        """At once: what has been measured is not lost if the rest does not come to its end."""
        rows.append({**stamp, **row})
        print(rows[-1], flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")

    for model in given.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(MODELS[model]))
            began = time.perf_counter()
            options = {"load_format": "dummy", "device": "cuda", "max_model_len": 8192, "max_num_seqs": 512}
            engine = Engine.build(EngineOptions(model=folder, **options | given.engine))
            ready = time.perf_counter() - began + imported
        print(model, engine.timeline, flush=True)
        keep({"model": model, "work": given.start, "rep": 0, "seconds": round(ready, 3)})
        generate(engine, fixed(8, 64, 32, seed=99), "warm")
        for name in given.work.split(","):
            for rep in range(given.reps):
                keep({"model": model, "work": name, "rep": rep, **run(engine, name, rep)})
        if given.profile:
            from gpu_profile import profile

            profile(engine, model, given.profile)
        engine.shutdown()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    print_table(rows)


def run(engine: Engine, name: str, rep: int) -> dict[str, Any]:
    work = WORKS[name]()
    steps = engine.scheduler.stats().steps
    with MemoryWatch() as memory, HostClock(engine) as clock:
        seconds = generate(engine, work, f"{name}-{rep}")
    return {
        "seconds": round(seconds, 3),
        "out_tok_s": round(sum(work[1]) / seconds, 1),
        "in_tok_s": round(sum(map(len, work[0])) / seconds, 1),
        "steps": engine.scheduler.stats().steps - steps,
        "peak_gib": round(memory.peak, 1),
        "mean_gib": round(memory.mean, 1),
        **clock.row(),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    last = {(row["model"], row["work"]): row for row in rows}
    print(f"{'model':<12}{'work':<18}{'seconds':>9}{'out tok/s':>11}{'in tok/s':>11}{'steps':>7}{'peak GiB':>10}")
    for (model, work), row in last.items():
        rates = f"{row.get('out_tok_s', 0):>11,.0f}{row.get('in_tok_s', 0):>11,.0f}"
        print(f"{model:<12}{work:<18}{row['seconds']:>9.2f}{rates}{row.get('steps', 0):>7}{row.get('peak_gib', 0):>10}")


if __name__ == "__main__":
    main()
