"""`octavo infer`: a chat in the terminal, or the answers to a data set, by ms-swift's flags."""

import argparse

from octavo.cli.options import add_options, from_args
from octavo.swift.arguments import InferArguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, InferArguments, "ms-swift's flags; - and _ are the same")


def run(arguments: argparse.Namespace) -> int:
    options = from_args(InferArguments, arguments)
    from octavo.log import logger
    from octavo.swift.commands import infer_main

    if not options.verbose:
        logger.setLevel("WARNING")
    return infer_main(options)
