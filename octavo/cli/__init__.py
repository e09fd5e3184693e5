"""The `octavo` command. Each subcommand is a module of this package, imported when it is called.

A module has `HELP`, `add_arguments(parser)` and `run(arguments) -> exit code`; a user's mistake is one line on standard
error and exit code 2, never a traceback.
"""

import argparse
import codecs
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from octavo import log
from octavo.cli.options import Parser
from octavo.errors import OctavoError
from octavo.version import __version__

COMMANDS = {
    "serve": "serve a model with OpenAI's HTTP interface",
    "chat": "chat with a model in the terminal, or answer a piped prompt",
    "generate": "answer a file of prompts",
    "pull": "fetch a model",
    "infer": "chat with a model by ms-swift's flags, or answer a data set",
    "deploy": "serve a model by ms-swift's flags",
    "plan": "say what a model needs and what fits here, before it is fetched",
    "doctor": "look for what is wrong with this machine, and say the fix",
    "parity": "compare a model's logits and greedy tokens with transformers",
    "bench": "measure throughput, latency or a running server",
}


def _prepare_streams() -> None:
    """Lets any text be read and written: closed streams lead nowhere, and what a terminal cannot show becomes `?`."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="replace")
        elif isinstance(stream, io.TextIOWrapper):
            # ASCII says that nobody has said anything; what is not Unicode text is told where it is used.
            ascii_alone = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if ascii_alone else stream.encoding, errors="surrogateescape")


class _Subcommand(Parser):
    """A subcommand's parser, whose arguments are added only if the subcommand is the one that was called."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.module: Any = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module is None:
            self.module = import_module(f"octavo.cli.{self.prog.split()[-1]}")
            self.module.add_arguments(self)
            self.set_defaults(run=self.module.run)
            if "--verbose" not in self._option_string_actions:
                self.add_argument("--verbose", action="store_true", help="say more while working")
        return super().parse_known_args(args, namespace)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line `words` (sys.argv by default) and returns the exit code."""
    _prepare_streams()
    parser = Parser(prog="octavo", description="LLM inference and serving on PagedAttention.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Subcommand, required=True)
    for name, text in COMMANDS.items():
        subcommands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    try:
        if not (sys.argv[1:] if words is None else words):
            parser.print_help()
            sys.stdout.flush()
            return 2
        try:
            arguments: argparse.Namespace = parser.parse_args(words)
        except SystemExit:
            sys.stdout.flush()
            raise
        log.setup(getattr(arguments, "verbose", False), lines=getattr(arguments, "log_format", "text"))
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except OctavoError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        # Said by the system to whoever asked last, so nobody knows for what.
        print(
            "octavo: error: this machine's memory is used up; free some, or use a smaller or quantized model",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; say nothing more, and keep the interpreter from trying at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # What the system refuses is no fault of the program: a full disk, a folder that is not there.
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"octavo: error: {name}{error.strerror or error}", file=sys.stderr)
        return 2
