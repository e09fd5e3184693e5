"""Flags made from dataclass fields."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from octavo import __version__
from octavo.cli import COMMANDS, main
from octavo.cli.options import Parser, add_options, from_args
from octavo.config import EngineOptions, ServerOptions, option, parse_size


@dataclass
class Sample:
    model: str = option("m", "the model", positional=True, metavar="MODEL")
    count: int | None = option(None, "how many")
    share: float = option(0.5, "what share of 100%")
    quick: bool = option(True, "be quick")
    kind: Literal["a", "b"] = option("a", "which kind")
    size: int | None = option(None, "how large", parse=parse_size, metavar="SIZE")


def parse(*words):
    parser = Parser(prog="octavo sample")
    add_options(parser, Sample, "sample")
    return from_args(Sample, parser.parse_args(list(words)))


def test_defaults_are_the_dataclass_s():
    assert parse() == Sample()


def test_every_kind_of_field():
    given = parse("x", "--count", "3", "--share=0.25", "--no-quick", "--kind", "b", "--size", "2GiB")
    assert given == Sample("x", 3, 0.25, False, "b", 2 * 1024**3)


def test_underscores_are_dashes():
    parser = Parser(prog="octavo serve")
    add_options(parser, EngineOptions, "engine")
    words = ["--max_model_len=512", "--no-enable_prefix_caching", "--block-size", "32"]
    options = from_args(EngineOptions, parser.parse_args(words))
    assert (options.max_model_len, options.enable_prefix_caching, options.block_size) == (512, False, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cuont", "3"], "Did you mean '--count'?"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--size", "2 apples"], "write bytes or a unit"),
        (["--coun", "3"], "Did you mean '--count'?"),
    ],
)
def test_mistakes_are_answered_with_the_fix(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", [EngineOptions, ServerOptions])
def test_every_option_has_help(kind):
    parser = Parser(prog="octavo serve")
    add_options(parser, kind, "options")
    assert "None" not in parser.format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "octavo", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"usage: octavo {command}" in shown.stdout
    assert "| torch" not in shown.stderr, "--help loads torch"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--max-modl-len", "5"], "Did you mean '--max-model-len'?"),
        (["bench", "latency", "--batch-sise", "5"], "Did you mean '--batch-size'?"),
        (["serv"], "Did you mean 'serve'?"),
        (["serve", "--dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
        (["generate"], "octavo generate --help"),
    ],
)
def test_mistakes_in_subcommands(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "serve a model" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"octavo {__version__}\n"


def test_a_user_s_mistake_is_one_line(capsys):
    assert main(["pull", "no-such-model"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("octavo: error: ")
