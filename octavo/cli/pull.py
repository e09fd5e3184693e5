"""`octavo pull`: fetch a model before it is needed."""

import argparse

from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EngineOptions, "model", only=("model", "hub", "revision"))
    parser.add_argument("--update", action="store_true", help="ask the hub for newer files, even if all are here")


def run(arguments: argparse.Namespace) -> int:
    from octavo.checkpoint import hubs, local_path, locate
    from octavo.checkpoint.hub import MODELS
    from octavo.models import check_runnable

    options = from_args(EngineOptions, arguments)
    name = hubs.RepositoryName.parse(options.model)
    if arguments.update and name and options.model not in MODELS and local_path(options.model) is None:
        print(hubs.pull(name, options.hub, options.revision, check_runnable))
    else:
        print(locate(options.model, options.hub, options.revision, check_runnable))
    return 0
