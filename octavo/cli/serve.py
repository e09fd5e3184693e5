"""`octavo serve`: the HTTP server."""

import argparse
from pathlib import Path

from octavo.checkpoint.repository import RepositoryName
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
    if hasattr(arguments, "model"):
        return
    for name in LISTS:
        given = getattr(arguments, name, [])
        if len(given) > 1 or any(_names_a_model(text) for text in given):
            flag = "--" + name.replace("_", "-")
            # A key is nothing to be printed.
            taken = f"{len(given)} values" if name == "api_key" else " and ".join(map(repr, given))
            raise ConfigError(
                f"{flag} has taken {taken}, and no model is named; write the model first: octavo serve MODEL {flag} ..."
            )


def _names_a_model(text: str) -> bool:
    from octavo.checkpoint.hub import MODELS

    return text in MODELS or RepositoryName.parse(text) is not None or Path(text).exists()


def run(arguments: argparse.Namespace) -> int:
    from octavo.server.run import run_server

    _check_model_was_meant(arguments)
    arguments = argparse.Namespace(**translated(vars(arguments), FOREIGN))
    return run_server(
        from_args(EngineOptions, arguments), from_args(ServerOptions, arguments), verbose=arguments.verbose
    )
