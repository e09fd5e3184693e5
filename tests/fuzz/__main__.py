"""Long runs: `scripts/fuzz files --mutants 5000 --seed 1`. Each fault is printed with the command that repeats it."""

import argparse
import sys
import time
from collections import Counter


def files(arguments: argparse.Namespace) -> int:
    from tests.fuzz import files as of_files

    numbers = range(arguments.mutants) if arguments.only is None else [arguments.only]
    began, faults, slowest = time.monotonic(), Counter[str](), (0.0, 0)
    count = 0
    for outcome, what in of_files.run(arguments.seed, numbers, quiet=arguments.only is None):
        count += 1
        slowest = max(slowest, (outcome.seconds, outcome.number))
        if outcome.fault:
            faults[outcome.fault.partition(":")[0]] += 1
            print(f"{what}\n    {outcome.fault}")
            print(f"    scripts/fuzz files --seed {arguments.seed} --only {outcome.number}", flush=True)
        if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
            print(f"stopped after {arguments.seconds:g} s")
            break
    print(
        f"{sum(faults.values())} of {count} mutants of seed {arguments.seed} are read wrongly,"
        f" in {time.monotonic() - began:.0f} s; the slowest, {slowest[1]}, took {slowest[0]:.1f} s"
    )
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    of_files = kinds.add_parser("files", help="damaged files of models and tokenizers")
    of_files.add_argument("--mutants", type=int, default=5000, metavar="N", help="how many (default: 5000)")
    of_files.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    of_files.add_argument("--only", type=int, metavar="N", help="the mutant N alone, with what it prints")
    of_files.add_argument("--seconds", type=float, metavar="S", help="stop after so long")
    of_files.set_defaults(run=files)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
