"""`octavo deploy`: the HTTP server by ms-swift's flags; the served name is the model type."""

import argparse

from octavo.cli.options import add_options, from_args
from octavo.swift.arguments import DeployArguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DeployArguments, "ms-swift's flags; - and _ are the same")


def run(arguments: argparse.Namespace) -> int:
    options = from_args(DeployArguments, arguments)
    from octavo.swift.commands import deploy_main

    return deploy_main(options)
