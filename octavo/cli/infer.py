"""`octavo infer`: a chat in the terminal, or the answers to a data set, by ms-swift's flags."""

import argparse

from octavo.cli.options import add_options, from_args, given
from octavo.config import EngineOptions
from octavo.swift.arguments import InferArguments, own_engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, InferArguments, "ms-swift's flags; - and _ are the same", skip=("own",))
    add_options(parser, EngineOptions, "Octavo's own: model and engine", only=own_engine_options(InferArguments))


def run(arguments: argparse.Namespace) -> int:
    options = from_args(InferArguments, arguments)
    options.own = given(arguments, own_engine_options(InferArguments))
    from octavo.log import logger
    from octavo.swift.commands import infer_main

    if not options.verbose:
        logger.setLevel("WARNING")
    return infer_main(options)
