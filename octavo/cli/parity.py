"""`octavo parity`: Octavo beside transformers on this machine, with the user's own weights."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli.options import add_options, from_args
from octavo.config import EngineOptions
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.parity import PromptParity

PROMPTS = {
    "English": "The octavo was the book that fitted a saddlebag. Printers folded each sheet three times, and",
    "Chinese": "浙江的省会在哪里？请介绍一下那里的历史、风景和有名的菜。",
    "code": "def quicksort(values):\n    if len(values) < 2:\n        return values\n    pivot = values[0]\n",
    "emoji": "Weather today: ☀️🌤️⛅ then 🌧️. Family: 👩‍👩‍👧‍👦, flags: 🇫🇷🇨🇳. What should I wear? 🤔",
    "one word": "Hello",
    "long": "".join(f"Line {i}: the sum of {i} and {i * 7} is {i * 8}.\n" for i in range(60)),
}
# The others are settled by what a comparison is: fp32, real weights, one prompt a request.
_OPTIONS = ("model", "hub", "revision", "tokenizer", "device", "max_model_len", "kv_cache_memory", "max_num_seqs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    skip = [name for name in EngineOptions.__dataclass_fields__ if name not in _OPTIONS]
    add_options(parser, EngineOptions, "model", skip)
    group = parser.add_argument_group("comparison")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="a file with a prompt a line")
    group.add_argument("--max-tokens", type=int, default=24, metavar="N", help="greedy tokens a prompt (default: 24)")
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference of a logit (default: what rounding to fp32 explains in this model)",
    )


def run(arguments: argparse.Namespace) -> int:
    from octavo.parity import compare

    if arguments.max_tokens < 1:
        raise ConfigError(f"max_tokens is {arguments.max_tokens}; it must be at least 1")
    options = from_args(EngineOptions, arguments)
    options.dtype = "float32"
    options.gpu_memory_utilization = 0.4  # the other model needs room as well
    prompts = PROMPTS if arguments.prompts is None else _read_prompts(arguments.prompts)
    width = max(map(len, prompts))
    found: list[PromptParity] = []
    for row in compare(options, prompts, arguments.max_tokens):
        if arguments.tolerance is not None:
            row = replace(row, tolerance=arguments.tolerance)
        if not found:
            print(f"{'prompt':<{width}}  tokens  max |difference|  allowed  equal greedy tokens")
        found.append(row)
        numbers = f"{row.num_prompt:>6}  {row.max_difference:>16.1e}  {row.tolerance:.1e}"
        print(f"{row.name:<{width}}  {numbers}  {_tokens(row)}", flush=True)
    equal = sum(row.first_difference is None for row in found)
    good = equal == len(found) and all(row.max_difference <= row.tolerance for row in found)
    worst = max((row.max_difference for row in found), key=lambda x: math.inf if math.isnan(x) else x)
    print(
        f"{'equal' if good else 'DIFFERENT'}: logits within {worst:.1e},"
        f" {equal} of {len(found)} answers have the same greedy tokens"
    )
    return 0 if good else 1


def _tokens(row: "PromptParity") -> str:
    if row.first_difference is None:
        return f"all {row.num_answer}"
    return (
        f"{row.first_difference} of {row.num_answer}, then {row.our_token!r};"
        f" transformers has {row.their_token!r}, whose logit leads by {row.lead:.1e}"
    )


def _read_prompts(path: Path) -> dict[str, str]:
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {path} cannot be read as text: {error}") from None
    if not lines:
        raise ConfigError(f"prompts: {path} holds no prompt; write one a line")
    return {f"{i + 1}: {line[:20]}": line for i, line in enumerate(lines)}
