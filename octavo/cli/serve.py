"""`octavo serve`: the HTTP server."""

import argparse

from octavo.cli.options import add_foreign, add_options, from_args
from octavo.config import LISTS, EngineOptions, ServerOptions
from octavo.errors import ConfigError
from octavo.vllm_arguments import ENGINE, SERVER, translated

FOREIGN = ENGINE | SERVER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EngineOptions, "model and engine")
    add_options(parser, ServerOptions, "server")
    add_foreign(parser, FOREIGN)


def _check_model_was_meant(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` where an option that takes several texts may have taken the model for one of them."""
    for name in LISTS:
        if not hasattr(arguments, "model") and len(given := getattr(arguments, name, [])) > 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} has taken {' and '.join(map(repr, given))}, and no model is named; write the model first:"
                f" octavo serve MODEL {flag} ..."
            )


def run(arguments: argparse.Namespace) -> int:
    from octavo.server.run import run_server

    _check_model_was_meant(arguments)
    arguments = argparse.Namespace(**translated(vars(arguments), FOREIGN))
    return run_server(
        from_args(EngineOptions, arguments), from_args(ServerOptions, arguments), verbose=arguments.verbose
    )
