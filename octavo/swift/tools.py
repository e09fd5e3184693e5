"""Tools as a part of the system prompt, in the ways that ms-swift names `tools_prompt`.

Only the renderings are here; what a model answers to them is text, which the caller reads.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from octavo.errors import RequestError, nearest

# Named by ms-swift, but not rendered here.
UNSUPPORTED = ("toolbench", "glm4")


def render_tools(tools: str | Sequence[Mapping[str, Any]], kind: str) -> str:
    """The text that describes `tools` (a list of OpenAI's tool objects, or its JSON) to the model.

    Raises `RequestError`.
    """
    kinds = _prompts()
    if kind not in kinds:
        why = "is not supported yet" if kind in UNSUPPORTED else "is not known." + nearest(kind, kinds)
        raise RequestError(f"tools_prompt {kind!r} {why}; use one of {', '.join(kinds)}", "tools_prompt")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RequestError(f"tools is not JSON ({error}); give a list of tools", "tools") from None
    names, descriptions = [], []
    for index, tool in enumerate(tools):
        about = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(about, Mapping) or not isinstance(about.get("name"), str):
            raise RequestError(f"tools[{index}] has no name; give an object with name and parameters", "tools")
        names.append(about["name"])
        # Python's own notation of the mapping is what models were trained on.
        descriptions.append(str(dict(about)))
    return kinds[kind].format(tool_list="\n\n".join(descriptions), tool_names=",".join(names))


def _prompts() -> dict[str, str]:
    text = files("octavo.swift").joinpath("data/tool_prompts.json").read_text("utf-8")
    found: dict[str, str] = json.loads(text)
    return found
