"""`octavo deploy`: the HTTP server by ms-swift's flags; the served name is the model type."""

import argparse

from octavo.cli.options import add_options, from_args, given
from octavo.config import EngineOptions, ServerOptions
from octavo.swift.arguments import DeployArguments, own_engine_options, own_server_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DeployArguments, "ms-swift's flags; - and _ are the same", skip=("own",))
    add_options(parser, EngineOptions, "Octavo's own: model and engine", only=own_engine_options(DeployArguments))
    add_options(parser, ServerOptions, "Octavo's own: server", only=own_server_options())


def run(arguments: argparse.Namespace) -> int:
    options = from_args(DeployArguments, arguments)
    options.own = given(arguments, [*own_engine_options(DeployArguments), *own_server_options()])
    from octavo.swift.commands import deploy_main

    return deploy_main(options)
