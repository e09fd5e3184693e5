"""`octavo bench compare --against PEER`: the same workloads through Octavo and an installed peer, turn by turn.

Each engine lives in a process of its own for the whole comparison and waits while the other runs, so that what else the
machine does strikes both: A B A B, the median of each, and the ratio of the medians. Greedy, EOS ignored, the prefix
cache empty at each start, the same number of threads. How a peer is driven is written in `peers/`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from octavo.cli.bench import print_json, print_table
from octavo.cli.bench.workloads import WORKLOADS, workload
from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions
from octavo.errors import ConfigError

PEERS = ("llama.cpp", "vllm", "ctranslate2", "transformers")
_SECONDS_TO_END = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument("--against", required=True, choices=PEERS, help="the peer; its package must be installed")
    group.add_argument("--peer-model", metavar="PATH", help="what the peer loads (default: the same as Octavo)")
    group.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="Python that has the peer")
    group.add_argument(
        "--work", metavar="NAMES", help=f"workloads, with commas between: {', '.join(WORKLOADS)} (default: all)"
    )
    group.add_argument("--turns", type=int, default=3, metavar="N", help="runs of each engine that count (default: 3)")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    if arguments.turns < 1:
        raise ConfigError(f"turns is {arguments.turns}; it must be at least 1")
    names = arguments.work.split(",") if arguments.work else list(WORKLOADS)
    works = {name: workload(name) for name in names}
    options = from_args(EngineOptions, arguments)
    threads = len(os.sched_getaffinity(0))
    peer_options = {"model": arguments.peer_model or _path(options), "threads": threads}
    with (
        _Contestant(sys.executable, "octavo", {"options": asdict(options), "threads": threads}) as ours,
        _Contestant(arguments.peer_python, arguments.against, peer_options) as theirs,
    ):
        rows = [_compare(name, *works[name], ours, theirs, arguments.turns) for name in names]
    print_table(rows)
    print_json(
        {
            "benchmark": "compare",
            "against": arguments.against,
            "threads": threads,
            "octavo": ours.about,
            "peer": theirs.about,
            "ready_s": {"octavo": ours.ready, "peer": theirs.ready},
            "rows": rows,
        }
    )
    return 0


def _path(options: EngineOptions) -> str:
    from octavo.checkpoint import locate
    from octavo.models import check_runnable

    return str(locate(options.model, options.hub, options.revision, check_runnable))


def _compare(
    name: str, prompts: list[list[int]], lengths: list[int], ours: "_Contestant", theirs: "_Contestant", turns: int
) -> dict[str, Any]:
    """Medians over `turns`, after one run of each that does not count; tokens read where only one is generated."""
    seconds: dict[str, list[float]] = {"octavo": [], "peer": []}
    for turn in range(turns + 1):
        for who, contestant in (("octavo", ours), ("peer", theirs)):
            took = contestant.ask(prompts, lengths)
            if turn:
                seconds[who].append(took)
    tokens = sum(map(len, prompts)) if max(lengths) == 1 else sum(lengths)
    rates = {who: tokens / statistics.median(times) for who, times in seconds.items()}
    return {
        "work": name,
        "precision": ours.about["precision"],
        "octavo": round(rates["octavo"], 1),
        "peer": theirs.about["precision"],
        "peer_tok_s": round(rates["peer"], 1),
        "ratio": round(rates["octavo"] / rates["peer"], 2),
        "spread": round(max(max(times) / min(times) for times in seconds.values()), 2),
    }


class _Contestant:
    """An engine in a process: a line of JSON in, a line out."""

    def __init__(self, python: str, name: str, options: dict[str, Any]):
        module = f"octavo.cli.bench.peers.{name.replace('.', '_')}"
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} if python == sys.executable else _beside(),
        )
        try:
            said = self._hear()
        except ConfigError:
            self.close()
            raise
        self.ready: float = said["ready_s"]
        self.about: dict[str, Any] = said["about"]

    def ask(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "lengths": lengths}) + "\n")
        self._process.stdin.flush()
        said = self._hear()
        if said["generated"] != sum(lengths):
            raise ConfigError(f"{self.name} generated {said['generated']} tokens where {sum(lengths)} were asked for")
        return float(said["seconds"])

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"{self.name} ended with code {self._process.wait()}; see above for why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer

    def __enter__(self) -> "_Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, which may have some of its own to end first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with self._process:
            try:
                self._process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _beside() -> dict[str, str]:
    """The environment of another Python, in which Octavo's own folder can be imported and nothing else of ours."""
    from pathlib import Path

    import octavo

    return {**os.environ, "PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
