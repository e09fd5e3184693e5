"""The templates by name: `TemplateType`, `TEMPLATE_MAPPING`, registering one, getting a copy for a tokenizer."""

from copy import deepcopy
from typing import Any

from octavo.errors import ConfigError, nearest
from octavo.swift.names import Names
from octavo.swift.template import Template, TruncationStrategy
from octavo.swift.template_table import built_in
from octavo.swift.tokenizer import HfTokenizer

# Template type -> {"template": the template, and what else was registered with it}.
TEMPLATE_MAPPING: dict[str, dict[str, Any]] = {
    name: {"template": Template.from_facts(facts, name), "is_generation": facts.is_generation}
    for name, facts in built_in().items()
}

TemplateType: Any = Names("TemplateType", TEMPLATE_MAPPING)

# What get_template takes only so that a default may be written out.
_NO_EFFECT = {"use_loss_scale": False, "loss_scale_map": None, "sequence_parallel_size": 1, "rescale_image": -1}


def register_template(template_type: str, template: Template, *, exist_ok: bool = False, **kwargs: Any) -> None:
    """Adds a template under a name of its own; `exist_ok` lets it replace one."""
    if not exist_ok and template_type in TEMPLATE_MAPPING:
        raise ConfigError(f"template type {template_type!r} is registered already; set exist_ok=True to replace it")
    template.template_type = template_type
    TEMPLATE_MAPPING[template_type] = {"template": template, **kwargs}


def check_template_type(template_type: str) -> None:
    """Raises `ConfigError` with the nearest name for a template type that nobody registered."""
    if template_type not in TEMPLATE_MAPPING:
        raise ConfigError(
            f"template type {template_type!r} is not known.{nearest(str(template_type), TEMPLATE_MAPPING)}"
            " octavo.swift.TEMPLATE_MAPPING lists them, register_template adds one"
        )


def get_template(
    template_type: str,
    tokenizer: HfTokenizer,
    default_system: str | None = None,
    max_length: int | None = None,
    truncation_strategy: TruncationStrategy = "delete",
    model: Any = None,
    *,
    tools_prompt: str | None = None,
    strict_compat: bool = False,
    **kwargs: Any,
) -> Template:
    """A copy of the template `template_type`, bound to `tokenizer`.

    `default_system`: None for the template's own, "" for none. `max_length` bounds prompts in tokens: longer ones are
    deleted (their answer is empty) or lose their beginning, as `truncation_strategy` says. `strict_compat=True` lets
    messages write special tokens and repeats ms-swift's slips, for ids equal to its own. `model` is not needed.
    """
    check_template_type(template_type)
    for name, value in kwargs.items():
        if name not in _NO_EFFECT:
            raise ConfigError(f"{name} is not an option of get_template.{nearest(name, _NO_EFFECT)}")
        if value != _NO_EFFECT[name] and value is not None:
            raise ConfigError(f"{name} is {value!r}: it belongs to training or images, which Octavo does not do")
    template: Template = deepcopy(TEMPLATE_MAPPING[template_type]["template"])
    template.bind(
        tokenizer,
        default_system,
        max_length,
        truncation_strategy,
        tools_prompt=tools_prompt,
        strict_compat=strict_compat,
    )
    return template
