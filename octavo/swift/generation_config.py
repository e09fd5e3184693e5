"""`VllmGenerationConfig`: how answers are drawn, with ms-swift's defaults and its rules of assignment."""

from dataclasses import fields
from typing import Any

from octavo.errors import ConfigError, nearest
from octavo.sampling_params import SamplingParams

# What a model's generation_config.json may set; other fields of the file mean nothing here, `do_sample` among them.
FROM_FILE = (
    *("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "n", "logprobs", "seed"),
    *("length_penalty", "stop", "skip_special_tokens"),
)
_DEFAULTS: dict[str, Any] = {
    "max_tokens": 64,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "n": 1,
    "logprobs": None,
    "seed": None,
    "length_penalty": 1.0,
    "stop": None,
    "skip_special_tokens": False,
}
# vLLM's fields that Octavo has nothing for, with the one value at which they do nothing.
_NO_EFFECT: dict[str, Any] = {
    "best_of": None,
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "guided_decoding": None,
    "logits_processors": None,
    "truncate_prompt_tokens": None,
}
# Beams are asked for by either, and by Octavo's own `beam_width`.
_OFF = {"temperature": 0.0, "top_k": 0}
_BEAMS: dict[str, Any] = {"use_beam_search": False, "num_beams": 1}
_OTHER_NAMES = {"max_new_tokens", "do_sample", "max_length"}
_FIELDS = {field.name: field for field in fields(SamplingParams)}


class VllmGenerationConfig:
    """Sampling parameters by ms-swift's names, as attributes that can be set; `top_k` 0 becomes -1, which is all.

    `max_new_tokens` is another name of `max_tokens`. `do_sample = False` sets temperature 0, and True the temperature
    that was last set. `max_length` is refused. Any other parameter is one of `octavo.SamplingParams`.
    """

    _temperature: float
    max_tokens: int | None
    stop: Any
    stop_token_ids: Any
    top_k: int

    def __init__(
        self,
        max_tokens: int | None = 64,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        **given: Any,
    ):
        values = {**_field_defaults(), **_NO_EFFECT, **_BEAMS, **_DEFAULTS}
        values |= {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        values["repetition_penalty"] = repetition_penalty
        for name, value in values.items():
            setattr(self, name, value)
        for name, value in given.items():
            setattr(self, name, value)
        self.top_k = -1 if self.top_k == 0 else self.top_k

    @classmethod
    def from_model(cls, generation_config: dict[str, Any]) -> "VllmGenerationConfig":
        """The parameters that a model's generation_config.json gives; those it does not name keep their defaults."""
        given = {name: generation_config[name] for name in FROM_FILE if generation_config.get(name) is not None}
        if generation_config.get("max_new_tokens") is not None:
            given["max_tokens"] = generation_config["max_new_tokens"]
        return cls(**given)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_new_tokens":
            name = "max_tokens"
        elif name == "max_length":
            raise ConfigError("max_length is not supported; set max_new_tokens, the longest answer in tokens")
        elif name == "do_sample":
            assert value in (True, False), f"do_sample is {value!r}; it must be True or False"
            super().__setattr__("temperature", self._temperature if value else 0)
            return
        elif name == "stop":
            value = [value] if isinstance(value, str) else list(value or ())
        elif name == "temperature":
            super().__setattr__("_temperature", value)
        elif name not in _FIELDS and name not in _NO_EFFECT and name not in _BEAMS and name != "_temperature":
            known = {*_FIELDS, *_NO_EFFECT, *_BEAMS, *_OTHER_NAMES}
            raise ConfigError(f"{name} is not a generation parameter.{nearest(name, known)}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Reached only for what was never set.
        if name == "max_new_tokens":
            return self.max_tokens
        raise AttributeError(name)

    def sampling_params(self, extra_stops: list[str], stop_token_ids: list[int]) -> SamplingParams:
        """Octavo's parameters, with the stops that a template adds; raises `RequestError` or `ConfigError`."""
        for name, harmless in _NO_EFFECT.items():
            if getattr(self, name) not in (harmless, None):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which Octavo does not do; leave it at {harmless!r}"
                )
        values = {name: getattr(self, name) for name in _FIELDS}
        if (beams := self._num_beams()) > 1:
            # A search draws nothing and knows no stop strings: the template's end of a turn is a token as well.
            extra_stops = []
            values["beam_width"] = beams
            # Defaults for drawing give way; what was chosen is refused by name.
            values |= {name: off for name, off in _OFF.items() if values[name] == _DEFAULTS[name]}
        values["stop"] = list(dict.fromkeys([*self.stop, *extra_stops]))
        values["stop_token_ids"] = list(dict.fromkeys([*(self.stop_token_ids or ()), *stop_token_ids]))
        return SamplingParams(**values)

    def _num_beams(self) -> int:
        beams: int = max(self.beam_width, self.num_beams)
        if self.use_beam_search and beams < 2:
            raise ConfigError("use_beam_search is True, but num_beams is 1; set num_beams to the number of beams")
        return beams

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VllmGenerationConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _DEFAULTS)
        return f"VllmGenerationConfig({shown})"


def _field_defaults() -> dict[str, Any]:
    blank = SamplingParams()
    return {name: getattr(blank, name) for name in _FIELDS}


LmdeployGenerationConfig = VllmGenerationConfig
