"""`octavo serve`: the HTTP server."""

import argparse

from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions, ServerOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EngineOptions, "model and engine")
    add_options(parser, ServerOptions, "server")


def run(arguments: argparse.Namespace) -> int:
    from octavo.server.run import run_server

    return run_server(
        from_args(EngineOptions, arguments), from_args(ServerOptions, arguments), verbose=arguments.verbose
    )
