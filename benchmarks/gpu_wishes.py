"""Output tokens a second on one GPU by what requests ask for: random weights, 300 tokens in, 128 out.

    python benchmarks/gpu_wishes.py --model qwen3-0.6b

After the speed, the host's mean microseconds a step; "wait" is for the device.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import MODELS, HostClock, fixed

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

TOKENS = 128
WISHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "top_p 0.8": {"top_p": 0.8},
    "top_k 20, top_p 0.8, repetition 1.05": {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    "repetition 1.1": {"repetition_penalty": 1.1},
    "logprobs 5": {"logprobs": 5},
}


def measure(engine: Engine, rows: int, wish: dict[str, Any], name: str) -> tuple[float, dict[str, int]]:
    """Of the second of two rounds: tokens a second, and the host's mean microseconds a step by part."""
    for turn in range(2):
        prompts, _ = fixed(rows, 300, TOKENS, seed=turn + 5)
        engine.scheduler.blocks.reset_prefix_cache()
        began = time.perf_counter()
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=TOKENS, **wish)
            engine.add(Request(f"{name}-{rows}-{turn}-{i}", prompt, params))
        with HostClock(engine) as clock:
            while engine.has_work():
                engine.step()
        seconds = time.perf_counter() - began
    return rows * TOKENS / seconds, clock.row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(MODELS))
    parser.add_argument("--rows", default="1,32,256")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[given.model]))
        options = {"load_format": "dummy", "device": "cuda", "max_model_len": 8192, "max_num_seqs": 512}
        engine = Engine.build(EngineOptions(model=folder, **options))
    print(f"{'rows':>5}  {'wish':<38}{'tok/s':>8}{'schedule':>10}{'submit':>8}{'wait':>8}{'update':>8}")
    for rows in map(int, given.rows.split(",")):
        for name, wish in WISHES.items():
            speed, host = measure(engine, rows, wish, name)
            parts = f"{host['schedule_us']:>10}{host['submit_us']:>8}{host['wait_us']:>8}{host['update_us']:>8}"
            print(f"{rows:>5}  {name:<38}{speed:>8.0f}{parts}", flush=True)


if __name__ == "__main__":
    main()
