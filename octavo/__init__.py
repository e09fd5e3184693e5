"""Octavo: an LLM inference and serving engine built on PagedAttention.

`import octavo` is cheap: the public names load what they need (torch among it) when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.errors import OctavoError
    from octavo.llm import LLM, AsyncLLM
    from octavo.request import CompletionOutput, Logprob, RequestOutput
    from octavo.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "OctavoError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOME_OF = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.llm",
    "CompletionOutput": "octavo.request",
    "Logprob": "octavo.request",
    "OctavoError": "octavo.errors",
    "RequestOutput": "octavo.request",
    "SamplingParams": "octavo.sampling_params",
}


def __getattr__(name: str) -> Any:
    try:
        module = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
