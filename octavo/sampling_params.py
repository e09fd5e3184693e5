"""How a request's tokens are drawn and when it ends. Names and meanings are those that vLLM's users know."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from octavo.errors import RequestError, nearest, short

MAX_LOGPROBS = 100
MAX_N = 128
MAX_BEAM_WIDTH = 32
# Each of these is looked for at every token.
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 256, 1024  # strings; characters of one
MAX_BAD_WORDS = 1024
MAX_PATTERN_SIZE, MAX_PATTERN_COUNT = 256, 256  # tokens of a repetition; times in a row
# Below this the temperature is greedy: the noise of a sample divides two logits only if they are equal in fp32.
MIN_TEMPERATURE = 1e-5
# Within these limits no number overflows where it meets a logit in fp32.
MAX_TEMPERATURE, MAX_BIAS, MAX_REPETITION_PENALTY = 1_000_000, 1_000_000, 1000
# What a beam search has no use for, with the value at which it is off: the search follows the model's own distribution.
_NOT_WITH_BEAMS: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "stop": [],
    "repetition_detection": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetectionParams:
    """Ends an answer, with finish reason "repetition", whose last tokens are a pattern of `min_pattern_size` to
    `max_pattern_size` tokens, `min_count` times in a row. 0 for the first is 1. Names and meanings are vLLM's."""

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_pattern_size", 1, MAX_PATTERN_SIZE),
            ("min_pattern_size", 0, MAX_PATTERN_SIZE),
            ("min_count", 2, MAX_PATTERN_COUNT),
        ):
            where = f"repetition_detection.{name}"
            _require(where, getattr(self, name), int)
            _in_range(where, getattr(self, name), least, most)
        if self.min_pattern_size > self.max_pattern_size:
            raise RequestError(
                f"repetition_detection.min_pattern_size is {self.min_pattern_size}; it must be at most max_pattern_size"
                f" ({self.max_pattern_size})",
                "repetition_detection.min_pattern_size",
            )

    @classmethod
    def of(cls, given: Any) -> "RepetitionDetectionParams":
        """From an object or a mapping of its fields; raises `RequestError`."""
        if isinstance(given, cls):
            return given
        known = {f.name for f in fields(cls)}
        if not isinstance(given, Mapping) or not {"max_pattern_size", "min_count"} <= set(given) <= known:
            raise RequestError(
                f"repetition_detection is {short(given)}; it must be an object with max_pattern_size and min_count, and"
                " perhaps min_pattern_size",
                "repetition_detection",
            )
        return cls(**given)


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; checked when made, a `RequestError` names the field, value and range.

    `temperature` 0 is greedy: exact argmax after bias and penalties. Filters apply in the order top_k, top_p, min_p
    to the distribution at the given temperature. `seed` fixes the tokens whatever else is in the batch.

    `beam_width` above 1 searches with so many beams and answers with the `n` best, by cumulative logprob /
    length ** `length_penalty`. `early_stopping` says when a search ends that holds `beam_width` finished answers: True,
    at once; False, when its best beam would not do better if it ended now; "never", when no beam could ever do better.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = field(default_factory=list)
    seed: int | None = None
    stop: list[str] | str = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_detection: RepetitionDetectionParams | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else _as_list("stop", self.stop)
        self.stop_token_ids = _as_list("stop_token_ids", self.stop_token_ids)
        self.bad_words = _as_list("bad_words", self.bad_words)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _as_list("allowed_token_ids", self.allowed_token_ids)
        if self.top_k == -1:
            self.top_k = 0
        if self.logit_bias is not None:
            self.logit_bias = self._integer_keys(self.logit_bias)
        if self.repetition_detection is not None:
            self.repetition_detection = RepetitionDetectionParams.of(self.repetition_detection)
            if self.ignore_eos:
                raise RequestError(
                    "repetition_detection ends an answer, and ignore_eos wants all of it; leave out one of them",
                    "repetition_detection",
                )
        self._check_counts()
        self._check_types()
        self._check_ranges()
        self._check_beams()

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "SamplingParams":
        """Parameters from a mapping; an unknown name is an error with the nearest known one."""
        cls.check_names(given)
        return cls(**given)

    @classmethod
    def check_names(cls, given: Mapping[str, Any]) -> None:
        """Raises `RequestError` for a name that is no sampling parameter's."""
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise RequestError(f"{name} is not a sampling parameter.{nearest(name, known)}", name)

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def beams(self) -> bool:
        """Whether the answers are searched for and not drawn."""
        return self.beam_width > 1

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once when the prompt is computed: samples, or beams."""
        return max(self.n, self.beam_width)

    @property
    def ends_at_limit(self) -> bool:
        """Whether nothing ends an answer but its length."""
        return self.ignore_eos and not self.stop and not self.stop_token_ids

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @staticmethod
    def _integer_keys(bias: dict[Any, float]) -> dict[int, float]:
        try:
            return {int(token): float(value) for token, value in bias.items()}
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise RequestError("logit_bias must map token ids to numbers", "logit_bias") from None

    def _check_counts(self) -> None:
        for name, most in (("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS)):
            if len(getattr(self, name)) > most:
                raise RequestError(f"{name} has {len(getattr(self, name))} entries; it may have {most}", name)

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens", "beam_width"):
            _require(name, getattr(self, name), int)
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), int)
        for name in (
            *("temperature", "top_p", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
        ):
            _require(name, getattr(self, name), (int, float))
            if not abs(getattr(self, name)) <= sys.float_info.max:
                raise RequestError(f"{name} is {short(getattr(self, name))}; it must be a finite number", name)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            _require(name, getattr(self, name), bool)
        for name in ("stop", "bad_words"):
            for item in getattr(self, name):
                _require(name, item, str)
                if not item:
                    raise RequestError(f"{name} holds an empty string; leave it out", name)
        for item in self.stop:
            if len(item) > MAX_STOP_LENGTH:
                raise RequestError(f"stop holds a string of {len(item)} characters, above {MAX_STOP_LENGTH}", "stop")
        for name in ("stop_token_ids", "allowed_token_ids"):
            given = getattr(self, name) or ()
            if set(map(type, given)) - {int}:  # a list may be as long as the vocabulary
                for item in given:
                    _require(name, item, int)
        for token, value in (self.logit_bias or {}).items():
            if not abs(value) <= MAX_BIAS:
                raise RequestError(
                    f"logit_bias of token {token} is {value}; it must be from {-MAX_BIAS} to {MAX_BIAS}",
                    "logit_bias",
                )

    def _check_ranges(self) -> None:
        _in_range("n", self.n, 1, MAX_N)
        _in_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _in_range("top_k", self.top_k, 0, None)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("min_tokens", self.min_tokens, 0, None)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1", "top_p")
        _in_range("repetition_penalty", self.repetition_penalty, 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        if self.seed is not None:
            _in_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", "min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty; no token could be drawn", "allowed_token_ids")

    def _check_beams(self) -> None:
        _in_range("beam_width", self.beam_width, 0, MAX_BEAM_WIDTH)
        _in_range("length_penalty", self.length_penalty, -10, 10)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping is {short(self.early_stopping)}; it must be True, False or "never"', "early_stopping"
            )
        if not self.beams:
            for name, off in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != off:
                    raise RequestError(
                        f"{name} is for beam search, which is off; set a beam width of 2 or more or leave it out", name
                    )
            return
        if self.n > self.beam_width:
            raise RequestError(
                f"n is {self.n}, but a search with {self.beam_width} beams has no more answers than that; lower n or"
                " raise the beam width",
                "n",
            )
        for name, off in _NOT_WITH_BEAMS.items():
            if getattr(self, name) != off:
                raise RequestError(
                    f"{name} is {short(getattr(self, name))}, which beam search does not use; set it to {off!r}", name
                )


def _as_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not (value is None or isinstance(value, Iterable)):
        raise RequestError(f"{name} is {short(value)}; it must be a list", name)
    return [] if value is None else list(value)


def _require(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else "number"
        raise RequestError(f"{name} is {short(value)}; it must be of type {wanted}", name)


def _in_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {short(value)}; it must be {wanted}", name)
