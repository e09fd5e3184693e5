"""Command-line flags made from the fields of option dataclasses, so that an option is written once.

`--max-model-len` and `--max_model_len` are the same flag. Knows nothing of what the options mean.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from octavo.config import format_size, parse_size
from octavo.errors import ConfigError, nearest
from octavo.vllm_arguments import Argument, spelled

Options = TypeVar("Options")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows no abbreviations and answers a mistyped flag with the nearest one."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}{self._hint(message)}\n")

    def _hint(self, message: str) -> str:
        """The nearest flag or choice to what was typed, or where to look."""
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            known = [choice.strip("' ") for choice in found[2].split(",")]
        hint = nearest(found[1], known) if found else ""
        return hint or f" ({self.prog} --help tells more)"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A subcommand's unknown flags are told by the subcommand, which knows its flags.
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args([_dashed(word) for word in words], namespace)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def _dashed(word: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def add_options(
    parser: argparse.ArgumentParser, kind: type[Any], title: str, skip: Sequence[str] = (), only: Sequence[str] = ()
) -> None:
    """Adds a flag for each field of the dataclass `kind` (of `only` some, if given), in a group of its own."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in skip and (not only or field.name in only):
            _add_option(group, field, hints[field.name])


def _add_option(group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]", hint: Any) -> None:
    meta = field.metadata
    flag = "--" + field.name.replace("_", "-")
    text = meta["help"].replace("%", "%%")
    if field.default not in (None, "auto", "", dataclasses.MISSING) and not isinstance(field.default, bool):
        default = format_size(field.default) if meta.get("parse") is parse_size else field.default
        text += f" (default: {default})"
    if meta.get("positional"):
        group.add_argument(field.name, nargs="?", default=argparse.SUPPRESS, metavar=meta["metavar"], help=text)
        return
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    hint = _without_none(hint)
    if typing.get_origin(hint) is list:
        settings |= {"nargs": "+", "action": "extend", "metavar": meta.get("metavar", "TEXT")}
    elif hint is bool and "parse" in meta:
        # In words, as `--stream false`; the flag alone is true.
        settings |= {"nargs": "?", "const": True, "type": _reader(meta["parse"]), "metavar": "true|false"}
        settings["help"] += f" (default: {str(field.default).lower()})"
    elif hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
        settings["help"] += f" (default: {'on' if field.default else 'off'})"
    elif typing.get_origin(hint) is typing.Literal:
        settings |= {"choices": typing.get_args(hint), "type": functools.partial(spelled, field.name)}
    else:
        settings["type"] = _reader(meta.get("parse", hint))
        settings["metavar"] = meta.get("metavar", {int: "N", float: "X"}.get(hint, "TEXT"))
    group.add_argument(flag, *meta.get("also", ()), **settings)


def add_foreign(parser: argparse.ArgumentParser, arguments: Mapping[str, Argument]) -> None:
    """Adds another engine's arguments, without help: their values are JSON, or texts."""
    for name, argument in arguments.items():
        flag = "--" + name.replace("_", "-")
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if argument.is_switch:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            parser.add_argument(flag, type=_json_or_text, **settings)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _reader(parse: Any) -> Any:
    """`parse` with its own message kept: argparse shows ArgumentTypeError's text and hides others'."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    read.__name__ = getattr(parse, "__name__", "value")
    return read


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return hint


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Of `names` those that were given."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def from_args(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """An instance of the dataclass `kind` from the flags that were given; the rest keep their defaults."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(arguments).items() if name in names})
