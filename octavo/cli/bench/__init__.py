"""`octavo bench`: throughput and latency of a model in this process, or of a running server.

Every benchmark prints a table and, as its last line, one JSON object.
"""

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from octavo.cli.options import Parser

KINDS = {
    "throughput": "whole workloads in this process: tokens a second",
    "latency": "one batch in this process: time to first token and per token",
    "beam": "beam search in the batch against an outer loop, and the blocks that sharing saves",
    "memory": "waste and batch of the KV cache against contiguous memory, without a model",
    "fairness": "one tenant's wait beside another's flood, with and without fair share, without a model",
    "serve": "a running OpenAI-compatible server under load",
    "compare": "the same workloads through Octavo and an installed peer, turn by turn",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="benchmarks", metavar="KIND", required=True, dest="kind", parser_class=Parser)
    for kind, text in KINDS.items():
        sub = kinds.add_parser(kind, help=text, description=text[0].upper() + text[1:] + ".")
        import_module(f"octavo.cli.bench.{kind}").add_arguments(sub)


def run(arguments: argparse.Namespace) -> int:
    code: int = import_module(f"octavo.cli.bench.{arguments.kind}").run(arguments)
    return code


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as an aligned table, numbers to the right."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line, given in [(names, names), *((line, list(row.values())) for line, row in zip(cells, rows, strict=True))]:
        numeric = [isinstance(value, int | float) for value in (rows[0].values() if given is names else given)]
        print(
            "  ".join(
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
        )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_json(result: dict[str, Any]) -> None:
    """The last line of a benchmark."""
    print(json.dumps(result))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 of times, in milliseconds."""
    import numpy as np

    values = np.array(seconds) * 1000
    return {
        "mean_ms": round(float(values.mean()), 3),
        "p50_ms": round(float(np.percentile(values, 50)), 3),
        "p90_ms": round(float(np.percentile(values, 90)), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
    }
