"""No message names an option that the command it is shown by lacks."""

import argparse
import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from octavo.cli import COMMANDS
from octavo.cli.options import Parser

ROOT = Path(__file__).parents[2] / "octavo"
# Of other programs: pip, llama-gguf-split, curl, nvidia-smi, CTranslate2's converter.
OTHERS = {
    *("--no-deps", "--no-binary", "--only-binary", "--no-input", "--progress-bar", "--disable-pip-version-check"),
    *("--dest", "--merge", "--unix-socket", "--query-gpu", "--format", "--output-dir", "--version"),
}
MODELS = ("serve", "chat", "generate", "infer", "deploy")  # run one
# By the beginnings of paths, the longest first, the commands that can show a message of the file.
SHOWN_BY = {
    "checkpoint": (*MODELS, "pull", "plan", "parity"),
    "engine/process": ("serve", "deploy"),  # generate waits for confirmations without an end
    "server": ("serve", "deploy"),
    "server/answer": ("serve", "deploy", "generate"),
    "server/model": ("serve", "deploy", "generate"),
    "server/protocol": ("serve", "deploy", "generate"),
    "vllm_arguments": ("serve",),
    "": MODELS,
}


def options_of(command: str) -> set[str]:
    """Every option of a command and of its own subcommands, with dashes."""
    parser = Parser(prog="octavo")
    import_module(f"octavo.cli.{command}").add_arguments(parser)
    found, parsers = {"--verbose", "--help"}, [parser]
    for one in parsers:
        found |= one._option_string_actions.keys()
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return {option.replace("_", "-") for option in found}


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    found = {command: options_of(command) for command in COMMANDS}
    assert "--max-model-len" in found["serve"]
    for name in ("throughput", "latency", "serve", "memory", "beam", "fairness", "compare"):
        parser = Parser(prog="octavo bench")
        import_module(f"octavo.cli.bench.{name}").add_arguments(parser)
        found["bench"] |= parser._option_string_actions.keys()
    return found


def texts(path: Path) -> Iterator[ast.Constant]:
    """The string literals of a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    documents = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            documents.add(id(getattr(node.body[0], "value", None)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node


def test_options_that_messages_name(options: dict[str, set[str]]):
    wrong, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).with_suffix("").as_posix()
        for node in texts(path):
            named = {word.replace("_", "-") for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)}
            for option in named - OTHERS:
                seen += 1
                if part.startswith("swift/"):
                    lacking = () if option in options["infer"] | options["deploy"] else ("infer", "deploy")
                elif part.startswith("cli/"):
                    command = part.split("/")[1]
                    shown_by = (command,) if command in COMMANDS else tuple(COMMANDS)
                    shown_by += ("serve",) if command == "doctor" else ()  # its advice is for those
                    known = set.union(*(options[name] for name in shown_by))
                    lacking = () if option in known else shown_by
                else:
                    key = max((key for key in SHOWN_BY if part.startswith(key)), key=len)
                    lacking = tuple(name for name in SHOWN_BY[key] if option not in options[name])
                if lacking:
                    wrong.append(f"{path}:{node.lineno} names {option}, which {', '.join(lacking)} lack")
    assert seen > 80
    assert wrong == []


def test_octavos_own_options_reach_ms_swifts_commands(tmp_path: Path):
    from octavo.cli.deploy import add_arguments
    from octavo.cli.options import from_args, given
    from octavo.swift.arguments import DeployArguments, own_engine_options, own_server_options

    (tmp_path / "model").mkdir()
    parser = Parser(prog="octavo deploy")
    add_arguments(parser)
    words = f"--model {tmp_path / 'model'} --device cpu --quantize int8 --max_queued_requests 7 --api_key a"
    arguments = parser.parse_args(words.split())
    deployed = from_args(DeployArguments, arguments)
    deployed.own = given(arguments, [*own_engine_options(DeployArguments), *own_server_options()])
    engine, server = deployed.engine_options(), deployed.server_options()
    assert (engine.device, engine.quantize, engine.seed) == ("cpu", "int8", 42)
    assert (server.max_queued_requests, server.api_key, server.host) == (7, ["a"], "0.0.0.0")
