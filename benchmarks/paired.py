"""Two packages of Octavo through the same workloads, in pairs: the median of the paired ratios says which is faster.

    python benchmarks/paired.py --before ../other --model smollm2:135m --pairs 7 --work decode1,decode8
    python benchmarks/paired.py --before ../other --device cuda --option dtype=bfloat16 --option load_format=dummy ...

Each package lives in a process of its own, and waits while the other runs: A B, B A, A B. A ratio above 1 means that
this checkout generates (or reads) more tokens a second than the one before. Uses nothing of Octavo but `LLM` and
`SamplingParams`, so that `--before` may be an old commit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

# (prompts, tokens of a prompt, tokens of an answer, tokens that all prompts begin with); answers of one token measure
# how fast prompts are read.
WORKLOADS = {
    "decode1": (1, 64, 128, 0),
    "decode8": (8, 64, 128, 0),
    "mixed": (32, 200, 60, 0),
    "prefill": (8, 1024, 1, 0),
    "shared": (24, 600, 32, 512),
    "mixed256": (256, 400, 200, 0),
    "in1024out128": (256, 1024, 128, 0),
    "shared256": (256, 2304, 128, 2048),
    "prefill64": (64, 1024, 1, 0),
}
CPU_WORK, GPU_WORK = "decode1,decode8,mixed,prefill,shared", "decode1,decode8,mixed256,in1024out128,shared256,prefill64"


def workload(name: str) -> tuple[list[list[int]], list[int]]:
    """Token ids of the prompts, and how many to generate for each; lengths of mixed ones spread by half."""
    count, length, answer, common = WORKLOADS[name]
    random = Random(name)
    prefix = [random.randint(100, 1000) for _ in range(common)]
    spread = 0.5 if name.startswith("mixed") else 0.0

    def around(size: int) -> int:
        return max(1, round(size * (1 + spread * (2 * random.random() - 1))))

    made = [[random.randint(100, 1000) for _ in range(around(length - common))] for _ in range(count)]
    return [prefix + own for own in made], [around(answer) for _ in range(count)]


def worker(options: dict[str, Any]) -> None:
    """A line of JSON in, the seconds of one run out."""
    from octavo import LLM, SamplingParams

    llm = LLM(**options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        prompts, lengths = workload(json.loads(line))
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        llm.engine.scheduler.blocks.reset_prefix_cache()
        began = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert sum(len(answer.outputs[0].token_ids) for answer in answers) == sum(lengths)
        print(json.dumps({"seconds": seconds}), flush=True)


class Package:
    """One of the two, in its process."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(folder)},
            cwd=folder,
        )
        self._hear()

    def run(self, name: str) -> float:
        """Seconds of one run of a workload."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()
        return float(self._hear()["seconds"])

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a package ended with code {self._process.wait()}; run its --worker to see why")
        said: dict[str, Any] = json.loads(line)
        return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="paired")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout to compare this one with")
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the engine")
    parser.add_argument("--work", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}, with commas between")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(json.loads(arguments.worker))
    if arguments.before is None:
        parser.error("name a checkout with --before")
    options = {"model": arguments.model, "device": arguments.device}
    for given in arguments.option:
        name, _, value = given.partition("=")
        options[name] = json.loads(value) if value[:1] in "0123456789-tfn" and value != "none" else value
    names = (arguments.work or (CPU_WORK if arguments.device == "cpu" else GPU_WORK)).split(",")
    folders = {"before": arguments.before.resolve(), "after": Path(__file__).parent.parent.resolve()}
    packages = {which: Package(folder, options) for which, folder in folders.items()}
    print(f"{'workload':14} {'before':>10} {'after':>10}  ratio  lowest highest   tokens/s, {arguments.pairs} pairs")
    for name in names:
        prompts, lengths = workload(name)
        tokens = sum(map(len, prompts)) if max(lengths) == 1 else sum(lengths)
        seconds: dict[str, list[float]] = {"before": [], "after": []}
        for pair in range(arguments.pairs + 1):
            for which in ("before", "after") if pair % 2 else ("after", "before"):
                took = packages[which].run(name)
                if pair:  # the first compiles and records
                    seconds[which].append(took)
        ratios = [a / b for a, b in zip(seconds["before"], seconds["after"], strict=True)]
        rates = {which: tokens / statistics.median(times) for which, times in seconds.items()}
        print(
            f"{name:14} {rates['before']:10.1f} {rates['after']:10.1f}"
            f"  {statistics.median(ratios):5.3f}  {min(ratios):6.3f} {max(ratios):7.3f}",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
