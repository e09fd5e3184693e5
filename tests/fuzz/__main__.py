"""Long runs: `scripts/fuzz files` and `scripts/fuzz requests`. Each fault is printed with what repeats it."""

import argparse
import sys

from tests.fuzz import files, run_requests


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    files.add_to(kinds)
    run_requests.add_to(kinds)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
