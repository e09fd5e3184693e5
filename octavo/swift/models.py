"""Model types: their ids on the hubs, the template that each goes with, and where their files are on this machine."""

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from octavo.checkpoint import hub, hubs
from octavo.checkpoint.repository import RepositoryName
from octavo.config import expanded
from octavo.errors import ConfigError, DownloadError, nearest
from octavo.models import check_runnable
from octavo.swift.names import Names


@cache
def _table() -> dict[str, dict[str, Any]]:
    lines = files("octavo.swift").joinpath("data/models.tsv").read_text("utf-8").splitlines()
    return {
        model_type: {"model_id_or_path": modelscope, "hf_model_id": hf or None, "template": template}
        for model_type, modelscope, hf, template in (line.split("\t") for line in lines[1:])
    }


# Model type -> {"model_id_or_path": ModelScope's id, "hf_model_id": Hugging Face's, "template": template type}.
MODEL_MAPPING: dict[str, dict[str, Any]] = {
    **_table(),
    "smollm2-135m-instruct": {"model_id_or_path": "smollm2:135m", "hf_model_id": None, "template": "smollm"},
}

ModelType: Any = Names("ModelType", MODEL_MAPPING)


def register_model(
    model_type: str,
    model_id_or_path: str | None,
    template: str,
    *,
    hf_model_id: str | None = None,
    exist_ok: bool = False,
) -> None:
    """Adds a model type: where its files are (a hub's id or a folder) and its template type."""
    if model_type in MODEL_MAPPING and not exist_ok:
        raise ConfigError(f"model type {model_type!r} is registered already; set exist_ok=True to replace it")
    MODEL_MAPPING[model_type] = {
        "model_id_or_path": model_id_or_path,
        "hf_model_id": hf_model_id,
        "template": template,
    }


def model_info(model_type: str) -> dict[str, Any]:
    """What is known of `model_type`; raises `ConfigError` with the nearest name."""
    found = MODEL_MAPPING.get(model_type)
    if found is None:
        raise ConfigError(
            f"model type {model_type!r} is not known.{nearest(str(model_type), MODEL_MAPPING)}"
            " octavo.swift.MODEL_MAPPING lists them, register_model adds one"
        )
    return found


def get_default_template_type(model_type: str) -> str | None:
    """The template type that `model_type` goes with; raises `ConfigError` for one that is not known."""
    template: str | None = model_info(model_type)["template"]
    return template


def guess_model_type(model: str) -> str | None:
    """The model type of a hub's id, or of a folder that is named after one; None if none fits."""
    name = Path(model).name.replace("___", ".").lower()
    for model_type, info in MODEL_MAPPING.items():
        ids = [found for found in (info["model_id_or_path"], info["hf_model_id"]) if found]
        if any(model == found for found in ids) or any(Path(found).name.lower() == name for found in ids):
            return model_type
    return None


def uses_hf() -> bool:
    """Whether `USE_HF` asks for Hugging Face's ids and cache first."""
    return os.environ.get("USE_HF", "").lower() in ("1", "true", "yes", "on")


def locate(
    model_type: str | None, model_id_or_path: str | None, revision: str | None = None, *, use_hf: bool | None = None
) -> str:
    """What to open for a model: a file or folder that is on this machine, or a name that Octavo knows.

    `use_hf` decides which hub's ids and cache go first; None leaves it to the environment (`USE_HF`).
    What is on neither cache is fetched from the first hub. Raises `DownloadError` if it cannot be, `ConfigError` for an
    unknown model type.
    """
    hf_first = uses_hf() if use_hf is None else use_hf
    ids = [model_id_or_path] if model_id_or_path else _ids(model_type, hf_first)
    for name in ids:
        if name in hub.MODELS:
            return name
        path = expanded(name)
        if path.exists():
            return str(path)
    order = ("hf", "modelscope") if hf_first else ("modelscope", "hf")
    repositories = [found for name in ids if (found := RepositoryName.parse(name)) is not None]
    for name_of_hub in order:
        for repository in repositories:
            if (whole := hubs.find(repository, name_of_hub, revision)) is not None:
                return str(whole)
    if not repositories:
        raise DownloadError(
            f"there is no model at {ids[0]}; name a folder with config.json, a .gguf file or a hub's id"
        )
    return str(hubs.pull(repositories[0], order[0], revision, check_runnable))


def _ids(model_type: str | None, hf_first: bool) -> list[str]:
    if model_type is None:
        raise ConfigError("neither a model type nor model_id_or_path is given; name one of them")
    info = model_info(model_type)
    ids = [info["model_id_or_path"], info["hf_model_id"]]
    return [name for name in (reversed(ids) if hf_first else ids) if name]
