"""What CI runs on a clean clone, in parts, each timed; see `run` beside this file.

Every part runs, whatever became of those before it, but nothing does without an installation. At the end stands what
each took beside what it may take. Exits with 1 if a part failed; where $CI is set, also if one took more than 1.5 times
its minutes.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.5


class Part(NamedTuple):
    """`minutes` on two idle cores; CONTRIBUTING.md has the same table."""

    name: str
    minutes: float
    command: str


PARTS = (
    Part("install", 3, "make .venv/.installed-dev"),
    Part("checks", 1, "make check"),
    Part("tests", 10, "make test"),
    Part("other builds", 4, "scripts/test -m other_builds"),
    Part("faults and fuzz", 4, "scripts/test -m faults"),
    Part("clients", 3, "scripts/clients"),
)


class Done(NamedTuple):
    part: Part
    code: int
    minutes: float

    @property
    def verdict(self) -> str:
        if self.code:
            return f"failed, exit code {self.code}"
        return "too slow" if self.minutes > MOST * self.part.minutes else "ok"


def run(parts: list[Part]) -> list[Done]:
    done = []
    for part in parts:
        print(f"\n==== {part.name}: {part.command} ({part.minutes:g} minutes)", flush=True)
        began = time.monotonic()
        environment = {"PYTEST_ADDOPTS": "--durations=10", **os.environ}
        code = subprocess.run(["bash", "-c", part.command], cwd=ROOT, env=environment).returncode
        done.append(Done(part, code, (time.monotonic() - began) / 60))
        if code and part is PARTS[0]:
            break
    return done


def table(done: list[Done]) -> str:
    lines = [f"{'part':<18}{'minutes':>8}{'planned':>9}{'allowed':>9}"]
    for each in done:
        planned = each.part.minutes
        numbers = f"{each.minutes:>8.1f}{planned:>9g}{MOST * planned:>9g}"
        lines.append(f"{each.part.name:<18}{numbers}  {each.verdict}")
    total, planned = sum(each.minutes for each in done), sum(each.part.minutes for each in done)
    return "\n".join([*lines, f"{'all':<18}{total:>8.1f}{planned:>9g}"])


def main(names: list[str]) -> int:
    if unknown := set(names) - {part.name for part in PARTS}:
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}")
        return 2
    done = run([part for part in PARTS if not names or part.name in names])
    print(f"\n{table(done)}", flush=True)
    wrong = [each for each in done if each.code or (os.environ.get("CI") and each.verdict != "ok")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
