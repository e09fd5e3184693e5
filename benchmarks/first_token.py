"""Milliseconds from a request to its first token, for prompts of several lengths that come together, on one GPU.

    python benchmarks/first_token.py --model qwen3-0.6b          # random weights

"graph" is Octavo as it is: a step with prompts is one graph, where that is faster. "launched" is the same with every
kernel launched by itself. Medians of 15 rounds, of different prompts, after 3 that are not counted.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

from gpu import MODELS, fixed

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.runner.prompt_graphs import PromptGraphs
from octavo.sampling_params import SamplingParams

ROUNDS, UNCOUNTED = 15, 3


def measure(engine: Engine, count: int, length: int) -> float:
    """Milliseconds until all of `count` prompts have their first token."""
    found = []
    for turn in range(UNCOUNTED + ROUNDS):
        began = time.perf_counter()
        for i, prompt in enumerate(fixed(count, length, 1, seed=turn)[0]):
            params = SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=1)
            engine.add(Request(f"{turn}-{i}", prompt, params))
        while engine.has_work():
            engine.step()
        found.append(1e3 * (time.perf_counter() - began))
    return median(found[UNCOUNTED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(MODELS))
    parser.add_argument("--prompts", default="1x32,1x128,1x512,1x2048,8x128,8x512,8x1024", help="count x tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[given.model]))
        options = {"load_format": "dummy", "device": "cuda", "max_model_len": 8192, "enable_prefix_caching": False}
        engine = Engine.build(EngineOptions(model=folder, **options))
    print(f"{given.model}, milliseconds to the first token\n{'prompts':>10}{'graph':>10}{'launched':>10}")
    for name in given.prompts.split(","):
        count, length = map(int, name.split("x"))
        as_it_is = measure(engine, count, length)
        with patch.object(PromptGraphs, "draw", lambda self, batch: None):
            launched = measure(engine, count, length)
        print(f"{name:>10}{as_it_is:>10.2f}{launched:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
