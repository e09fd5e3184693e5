"""`octavo pull`: fetch a model before it is needed."""

import argparse

from octavo.config import DEFAULT_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a known name")


def run(arguments: argparse.Namespace) -> int:
    from octavo.checkpoint.hub import pull

    print(pull(arguments.model))
    return 0
