"""Sampling defaults: what a model's makers advise in its generation_config.json, where a request says nothing.

They are the same in Python, on the command line and over HTTP. A known name's own advice (`checkpoint/hub`) is read as
if it stood in that file.
"""

from collections.abc import Mapping
from typing import Any

from octavo.sampling_params import SamplingParams

# Fields of generation_config.json that are sampling parameters, as for vLLM; and one that only our own advice has.
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_detection")


def advised(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters that the makers advise. `do_sample` false is temperature 0."""
    found = {name: generation_config[name] for name in _FIELDS if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def sampling_params(advice: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """`given`, and `advice` for what is not given. Raises `RequestError` as `SamplingParams` does.

    Advice is for drawing tokens, which a beam search does not; and who ignores EOS wants all tokens.
    """
    if given.get("beam_width", 0) > 1:
        advice = {"temperature": 0.0, "stop_token_ids": advice.get("stop_token_ids", [])}
    elif given.get("ignore_eos"):
        advice = {name: value for name, value in advice.items() if name != "repetition_detection"}
    return SamplingParams(**{**advice, **given})
