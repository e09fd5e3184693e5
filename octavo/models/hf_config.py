"""Fields of a Hugging Face config.json, read with their types checked and the old spellings known.

A `ConfigError` names the field, what it holds and what it should be. What the fields mean to a family is the
family's business; only the rotary embedding, which all share, is understood here.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from octavo.config import DTYPE_BYTES, RopeConfig
from octavo.errors import ConfigError

Scaling = Literal["none", "linear", "llama3", "yarn", "dynamic"]


# Far above any model; what follows from a number (tables of layers, of rotations) is made before weights are seen.
_LARGEST = 2**31 - 1
_MOST_LAYERS = 4096
_WIDEST_HEAD = 65536
_LARGEST_FLOAT = 3.4e38  # of 32 bits


def wrong(field: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"config.json: {field} is {value!r:.200}; it must be {wanted}")


class HFConfig:
    """A config.json, or an object inside it, whose fields are then named `inside.field` in errors."""

    def __init__(self, fields: Mapping[str, Any], inside: str = ""):
        self.fields = fields
        self.inside = inside

    def name(self, field: str) -> str:
        return f"{self.inside}.{field}" if self.inside else field

    def whole(self, field: str, default: int | None = None, most: int = _LARGEST) -> int:
        """An integer from 1 to `most`; required unless there is a default."""
        value = self._value(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(self.name(field), value, "an integer of at least 1")
        if value > most:
            raise wrong(self.name(field), value, f"at most {most}")
        return value

    def layers(self) -> int:
        """`num_hidden_layers`."""
        return self.whole("num_hidden_layers", most=_MOST_LAYERS)

    def count(self, field: str, default: int) -> int:
        """An integer of at least 0."""
        value = self._value(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise wrong(self.name(field), value, "an integer of at least 0")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A number above 0 that fits 32 bits; required unless there is a default."""
        value = self._value(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST_FLOAT:
            raise wrong(self.name(field), value, "a number above 0")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        value = self._value(field, default)
        if not isinstance(value, bool):
            raise wrong(self.name(field), value, "true or false")
        return value

    def choice(self, field: str, default: str, known: tuple[str, ...]) -> str:
        value = self._value(field, default)
        if value not in known:
            raise wrong(self.name(field), value, "one of " + ", ".join(known))
        return cast(str, value)

    def _value(self, field: str, default: Any) -> Any:
        value = self.fields.get(field)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(
                f"config.json: {self.name(field)} is missing; the file is incomplete, fetch the model again"
            )
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where there is none."""
        value = self.fields.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise wrong(self.name(field), value, "a token id or a list of them")
        return tuple(ids)

    def token_id(self, field: str) -> int | None:
        ids = self.token_ids(field)
        return ids[0] if ids else None

    def dtype(self) -> str:
        """`dtype`, which older files call `torch_dtype`; float32 where neither is set."""
        field = "dtype" if self.fields.get("dtype") is not None else "torch_dtype"
        return self.choice(field, "float32", tuple(DTYPE_BYTES))

    def head_dim(self, num_heads: int) -> int:
        """`head_dim`, or the model's width divided by its heads."""
        if self.fields.get("head_dim") is not None:
            head_dim = self.whole("head_dim", most=_WIDEST_HEAD)
        else:
            hidden_size = self.whole("hidden_size")
            if hidden_size % num_heads:
                raise wrong("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}")
            head_dim = hidden_size // num_heads
            if head_dim > _WIDEST_HEAD:
                raise wrong("hidden_size", hidden_size, f"at most {_WIDEST_HEAD} for each of {num_heads} heads")
        if head_dim % 2:
            raise wrong("head_dim", head_dim, "even, since its halves rotate against each other")
        return head_dim

    def kv_heads(self, num_heads: int) -> int:
        """`num_key_value_heads`, or as many as there are query heads."""
        kv_heads = self.whole("num_key_value_heads", num_heads)
        if num_heads % kv_heads:
            raise wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {num_heads}")
        return kv_heads

    def rope(self, head_dim: int, max_position: int) -> tuple[RopeConfig, int]:
        """The rotary embedding, and the longest context (tokens) that its scaling makes of `max_position`.

        Files put it into `rope_parameters`, or (older) into `rope_scaling` with `rope_theta` beside it.
        """
        scaling = self._rope_object()
        kind = scaling.choice(
            "rope_type", "default", ("default", "none", "linear", "llama3", "yarn", "dynamic", "freq_factors")
        )
        theta = scaling.number("rope_theta", self.number("rope_theta", 10000.0))
        part = scaling.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        rotary_dim = int(head_dim * part)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise wrong("partial_rotary_factor", part, f"such that an even part of head_dim {head_dim} rotates")
        if kind == "freq_factors":
            factors = _freq_factors(scaling, rotary_dim)
            return RopeConfig(theta=theta, rotary_dim=rotary_dim, freq_factors=factors), max_position
        return _scaled(scaling, kind, theta, rotary_dim, max_position)

    def _rope_object(self) -> "HFConfig":
        """The object that describes the rotary embedding; a rule named twice must be the same."""
        rules: dict[str, object] = {}
        found = HFConfig({}, "rope_scaling")
        for inside in ("rope_scaling", "rope_parameters"):
            stored = self.fields.get(inside) or {}
            if not isinstance(stored, Mapping):
                raise wrong(inside, stored, "an object with rope_type and its numbers")
            rules |= {f"{inside}.{word}": stored[word] for word in ("type", "rope_type") if stored.get(word)}
            if odd := [name for name, rule in rules.items() if not isinstance(rule, str)]:
                raise wrong(odd[0], rules[odd[0]], "the name of a rule")
            if stored:
                found = HFConfig({"rope_type": stored.get("type"), **stored}, inside)
        if len(set(rules.values())) > 1:
            listed = ", ".join(f"{name} is {rule!r}" for name, rule in rules.items())
            raise ConfigError(f"config.json: {listed}; they must be the same rule")
        return found


def _scaled(fields: HFConfig, kind: str, theta: float, rotary_dim: int, max_position: int) -> tuple[RopeConfig, int]:
    if kind in ("default", "none"):
        return RopeConfig(theta=theta, rotary_dim=rotary_dim), max_position
    if kind == "yarn":
        original = fields.whole("original_max_position_embeddings", max_position)
        # DeepSeek's files leave the factor out and mean the ratio of both lengths.
        factor = fields.number("factor", max(max_position / original, 1.0))
    else:
        # Dynamic stretches from the length the model's file gives, whatever else stands in it.
        original = max_position if kind != "llama3" else fields.whole("original_max_position_embeddings")
        factor = fields.number("factor")
    if factor < 1:
        raise wrong(fields.name("factor"), factor, "at least 1")
    low, high = fields.number("low_freq_factor", 1.0), fields.number("high_freq_factor", 4.0)
    if low >= high:
        raise wrong(fields.name("high_freq_factor"), high, f"above low_freq_factor, {low}")
    config = RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=cast(Scaling, kind),
        factor=factor,
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=_attention_factor(fields, factor),
        truncate=fields.flag("truncate", True),
    )
    # A llama3 file's max_position_embeddings is the stretched length already; the others give the original
    # one.
    return config, max_position if kind == "llama3" else max(max_position, int(original * factor))


def _attention_factor(fields: HFConfig, factor: float) -> float | None:
    """What cos and sin are multiplied by, if the file says so itself or by DeepSeek's pair of mscales."""
    if fields.fields.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if fields.fields.get("mscale") and fields.fields.get("mscale_all_dim"):
        log = 0.1 * math.log(factor)
        return (fields.number("mscale") * log + 1) / (fields.number("mscale_all_dim") * log + 1)
    return None


def _freq_factors(fields: HFConfig, rotary_dim: int) -> tuple[float, ...]:
    factors = fields.fields.get("factors")
    if not isinstance(factors, list | tuple) or len(factors) != rotary_dim // 2:
        raise wrong(fields.name("factors"), factors, f"a list of {rotary_dim // 2} numbers")
    if not all(isinstance(factor, int | float) and 0 <= factor < _LARGEST_FLOAT for factor in factors):
        raise wrong(fields.name("factors"), factors, "a list of numbers of at least 0")
    return tuple(float(factor) for factor in factors)
