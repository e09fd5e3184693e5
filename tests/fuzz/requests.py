"""Requests from a grammar of our own: each is made by its seed and number alone, well-typed or not.

Most have one odd value, so that a fault has a name; some have two, and some are odd as HTTP or as JSON. What is made
without an odd value is valid, and must be answered.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel

from octavo.sampling_params import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from octavo.server import protocol
from octavo.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from octavo.server.schema import components
from tests.served import BEGIN, CONTEXT, END, VOCABULARY, request_bytes

KINDS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_WEIGHTS = (4, 4, 1, 1)
_MOST_VALID_TOKENS = 12
Body = dict[str, Any]


class Raw(NamedTuple):
    """JSON as it goes over the wire, valid or not."""

    text: str


def encode(value: Any) -> str:
    """JSON of `value`, which may hold `Raw`; a dict's key may be a `(name, number)` to stand there twice."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        names = (name[0] if isinstance(name, tuple) else name for name in value)
        items = (f"{json.dumps(name)}:{encode(item)}" for name, item in zip(names, value.values(), strict=True))
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
        sys.set_int_max_str_digits(0)
    return json.dumps(value)


# ---- values -------------------------------------------------------------------------------------------------------

NESTED = Raw("[" * 10_000 + "]" * 10_000)
_NESTED_OBJECT = Raw('{"a":' * 10_000 + "1" + "}" * 10_000)
_LONG = "x" * 1_000_000
_NUMBERS = [
    *(0, 1, -1, 2, 100, 101, 128, 129, 255, 256, 257, 258, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(-(2**31), -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 2**70, Raw("1" + "0" * 400), Raw("-1" + "0" * 400)),
    *(0.0, Raw("-0"), Raw("-0.0"), 0.5, 1.5, -0.5, 1.0, 1.0000001, 0.9999999, 1e-50, 1e-45, 1e-38, 1.2e-38, 5e-324),
    *(1e-5, 9e-6, 1e-3, 9.9e-4, 999.0, 1000, 1000.1, 1e6, 1.1e6, 3.4e38, 1e39, 1e308, 1.7976931348623157e308),
    *(Raw("1e400"), Raw("-1e400"), Raw("1e-400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1E2")),
    *(Raw("01"), Raw("1."), Raw(".5"), Raw("+1"), Raw("0x10"), Raw("1" * 5000), Raw("0." + "1" * 5000)),
]
_TEXTS = [
    *("", " ", "x", "\0", "a\0b", "\n", "\r\n", "é", "🙂", "\ufeff", "\ufffe", "\uffff", "\ue000\uf8ff", "\U0010ffff"),
    *(Raw('"\\ud800"'), Raw('"\\udc00x"'), Raw('"a\\ud83d"'), Raw('"\\ude42\\ud83d"'), "a\u0301", "\u202e", "\x7f\x1b"),
    *("<s>", "</s>", "<s>user:", "{{ 7 * 7 }}", "{% for i in range(9) %}", "NaN", "Infinity", "null", "1", "never"),
    *("x" * 1025, "é" * 300, _LONG, " " * 100_000, "ab" * 20_000),
]
_OTHERS = [
    *(None, True, False, [], {}, [[]], [None], [{}], {"": 0}, {"a": [1]}, [0], ["x"], [[0]], [["x"]], [1.5], [True]),
    *(NESTED, _NESTED_OBJECT, Raw("["), Raw("}"), Raw(""), Raw('"'), Raw("tru"), Raw("'x'"), Raw("/**/1")),
    *(["x"] * 10_000, [0] * 10_000, [-1], [2**31], [2**63], [2**70], [Raw("1e400")], [1.0], [VOCABULARY]),
]
_SOME_TEXTS = ["user", "system", "text", "never", "none", "x"]
_SCHEMAS = components()
_ANYTHING = [*_NUMBERS, *_TEXTS, *_OTHERS]


def _texts(rng: random.Random, most: int = 12) -> str:
    """A text of at most so many bytes, of all kinds of characters."""
    text = ""
    for _ in range(rng.randint(1, most)):
        more = text + rng.choice(["a", "B", " ", "\n", "é", "世", "🙂", "\0", "<s>", "{{", "\ue000", "\u0301"])
        if len(more.encode()) > max(most, 4):
            break
        text = more
    return text or "a"


def _token(rng: random.Random) -> int:
    return rng.choice([0, BEGIN, END, VOCABULARY - 1, rng.randrange(VOCABULARY)])


def _tokens(rng: random.Random, most: int = 8) -> list[int]:
    return [_token(rng) for _ in range(rng.randint(1, most))]


def _message(rng: random.Random) -> Body:
    content: Any = _texts(rng)
    if rng.random() < 0.3:
        content = [{"type": "text", "text": _texts(rng, 6)} for _ in range(rng.randint(0, 3))]
    message: Body = {"role": rng.choice(["system", "developer", "user", "assistant"]), "content": content}
    if rng.random() < 0.2:
        message["name"] = _texts(rng, 6)
    return message


def _prompt(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return _texts(rng, 40)
    if kind == 3:
        return [_texts(rng) for _ in range(rng.randint(1, 4))]
    if kind == 4:
        return [_tokens(rng) for _ in range(rng.randint(1, 4))]
    if kind == 5:
        return [rng.randrange(256)]  # of one token
    if kind == 6:
        return [rng.randrange(256)] * (CONTEXT - _MOST_VALID_TOKENS)  # as long as may be
    return _tokens(rng, 60)


# ---- rules --------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a field may hold: a maker of valid values, and odd ones besides those that every field meets."""

    valid: Callable[[random.Random], Any]
    odd: tuple[Any, ...] = ()


def _of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(values)


def _number(low: float, high: float, *bounds: float) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice([low, high, *bounds, rng.uniform(low, high)])


_BAN_ALL = {str(token): -100 for token in range(VOCABULARY)}
# Rules are by name: fields of the same name in different requests mean the same.
RULES: dict[str, Rule] = {
    "model": Rule(_of("tiny", None), ("Tiny", "tiny ", "../tiny", "tin", "tiny\0")),
    "n": Rule(_of(1, 1, 1, 2, 3, 128), (0, 128, 129, -1)),
    "temperature": Rule(_number(0, 2, 1e-5, 9e-6, 1e-45, 5e-324), (-0.1, 2.0001, 1e6, 1e308, 1_000_001)),
    "top_p": Rule(_number(0.01, 1, 1e-50, 5e-324, 0.9999999), (0, 1.0000001, -1)),
    "top_k": Rule(_of(-1, 0, 1, 2, 50, VOCABULARY, 2**31, 2**63, 10**30, 10**400), (-2,)),
    "min_p": Rule(_number(0, 1, 1e-50, 0.5), (1.0000001, -1e-50)),
    "repetition_penalty": Rule(_number(0.5, 2, 1, 1e-3, 1000), (0, 1e-38, 1e39, -1, 1000.0001, 9.99e-4)),
    "presence_penalty": Rule(_number(-2, 2, 0), (-2.0001, 2.0001)),
    "frequency_penalty": Rule(_number(-2, 2, 0), (-2.0001, 2.0001)),
    "logit_bias": Rule(
        lambda rng: rng.choice(
            [
                {},
                {"5": 1, "6": -1.5},
                {"5": 99.9, "6": -100},
                {str(END): 100},
                {str(END): -100},
                {str(_token(rng)): rng.uniform(-100, 100) for _ in range(9)},
                _BAN_ALL,
                {str(token): 100 for token in range(VOCABULARY)},
                {"05": 1},
            ]
        ),
        (
            *({"5": 1e39, "6": 1e39}, {"5": 1e39, "6": -1e39}, {str(t): 1e39 for t in range(VOCABULARY)}),
            *(
                {str(t): -1e308 for t in range(VOCABULARY)},
                {"5": "Infinity"},
                {"5": Raw("Infinity")},
                {"5": Raw("NaN")},
            ),
            *({"a": 1}, {"1.5": 1}, {"": 1}, {" 5 ": 1}, {"0x5": 1}, {"5_0": 1}, {"٥": 1}, {"-1": 1}, {"1e2": 1}),
            *({"05": 1, "5": 2}, {("5", 0): 1, ("5", 1): 2}, {str(VOCABULARY): 1}, {str(2**63): 1}, {"9" * 5000: 1}),
            *({"5": None}, {"5": "1"}, {"5": True}, {"5": [1]}, {"5": {}}, [5, 6], [[5, 1]], {"x" * 100_000: 1}),
            {str(token): -1e6 for token in range(VOCABULARY)},
            {str(token): 1 for token in range(100_000)},
        ),
    ),
    "allowed_token_ids": Rule(
        lambda rng: rng.choice([[END], [5], [5, 5, 5], [END, 5], list(range(VOCABULARY)), _tokens(rng)]),
        ([], [-1], [VOCABULARY], [2**31], [5, 2**63], [5] * 100_000, [5, "6"], [5.0], [True]),
    ),
    "bad_words": Rule(
        lambda rng: rng.choice([[], ["a"], ["ab", "a b"], ["é", "🙂"], [_texts(rng, 6)], ["</s>"]]),
        (
            [""],
            ["a"] * 1024,
            ["a"] * 1025,
            [chr(i) for i in range(1, 1000)],
            ["x" * 100_000],
            ["a", 5],
            [Raw('"\\ud800"')],
        ),
    ),
    "seed": Rule(_of(0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)), (2**64, -(2**63) - 1)),
    "stop": Rule(
        lambda rng: rng.choice(
            [
                "a",
                ["a", "b"],
                ["\0"],
                ["\ue000"],
                ["🙂", "é"],
                [],
                ["x" * MAX_STOP_LENGTH],
                ["\n\n"],
                ["a"] * MAX_STOP_STRINGS,
            ]
        ),
        (
            *("", [""], ["a"] * (MAX_STOP_STRINGS + 1), "x" * (MAX_STOP_LENGTH + 1), [Raw('"\\ud800"')]),
            *(Raw('"\\udfff"'), ["a", None], [["a"]], ["a", 5], ["x" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS),
        ),
    ),
    "stop_token_ids": Rule(
        lambda rng: rng.choice([[], [5], [END], list(range(VOCABULARY)), _tokens(rng)]),
        ([-1], [VOCABULARY], [2**31], [2**70], [5] * 100_000, ["5"]),
    ),
    "include_stop_str_in_output": Rule(_of(True, False)),
    "ignore_eos": Rule(_of(True, False)),
    "min_tokens": Rule(_of(0, 1), (3, 16, 17, CONTEXT, -1, 2**31)),
    "max_tokens": Rule(
        lambda rng: rng.randint(1, _MOST_VALID_TOKENS), (0, -1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2**31)
    ),
    "max_completion_tokens": Rule(lambda rng: rng.randint(1, _MOST_VALID_TOKENS), (0, -1, CONTEXT, 2**63)),
    "logprobs": Rule(_of(0, 1, 5, 100), (101, -1, True, False)),
    "top_logprobs": Rule(_of(0, 1, 20, 100), (101, -1)),
    "prompt_logprobs": Rule(_of(0, 1, 100), (101, -1)),
    "skip_special_tokens": Rule(_of(True, False)),
    "use_beam_search": Rule(_of(True, False)),
    "best_of": Rule(_of(2, 4, 32), (0, 1, 33, 128, 129, -1)),
    "length_penalty": Rule(_number(-10, 10, 0, 1), (10.1, -10.1, 1e308)),
    "early_stopping": Rule(_of(True, False, "never"), ("Never", "always", "")),
    "repetition_detection": Rule(
        _of({"max_pattern_size": 4, "min_count": 3}, {"max_pattern_size": 256, "min_pattern_size": 2, "min_count": 2}),
        (
            *({}, {"max_pattern_size": 4}, {"min_count": 4}, {"max_pattern_size": 4, "min_count": 4, "more": 1}),
            *({"max_pattern_size": size, "min_count": 2} for size in (0, -1, 257, 2**70)),
            *({"max_pattern_size": 9, "min_count": count} for count in (0, 1, -1, 257, 2**70)),
            *({"max_pattern_size": 3, "min_count": 2, "min_pattern_size": size} for size in (-1, 4, 2**70)),
        ),
    ),
    "priority": Rule(_of(0, 1, -1, 2**31, 2**70, -(2**70))),
    "cache_salt": Rule(lambda rng: rng.choice(["a", "\0", _texts(rng) or "b"]), (_LONG, "")),
    "stream": Rule(_of(True, False)),
    "stream_options": Rule(
        _of(
            {},
            {"include_usage": True},
            {"include_usage": False},
            {"include_usage": True, "continuous_usage_stats": True},
        ),
        (
            {"continuous_usage_stats": True},
            {"include_usage": None},
            {"include_usage": 1},
            {"include_usag": True},
            {"include_obfuscation": True},
        ),
    ),
    "user": Rule(lambda rng: rng.choice(["", "a", _texts(rng)]), (_LONG,)),
    "safety_identifier": Rule(lambda rng: _texts(rng)),
    "prompt_cache_key": Rule(lambda rng: _texts(rng)),
    "messages": Rule(
        lambda rng: [_message(rng) for _ in range(rng.randint(1, 4))],
        (
            *([{"role": "user", "content": "x"}] * 8193, [{"role": "user", "content": "x" * 300}]),
            *([{"role": "user", "content": "x" * (CONTEXT + delta)}] for delta in range(-32, 3, 2)),
            [{"role": "user", "content": ""}] * 20,
            [{"role": "user", "content": [{"type": "text", "text": "x"}] * 8193}],
            [{"role": "user", "content": [{"type": "text", "text": "x"}] * 8000}],
        ),
    ),
    "prompt": Rule(
        _prompt,
        (
            *("x" * length for length in (CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT)),
            *([5] * length for length in (CONTEXT - 1, CONTEXT, CONTEXT + 1, 100_000)),
            *([-1], [2**31], [VOCABULARY], [5, 2**70], [[5], []], [[]], [5, "x"], ["x", 5], ["x", [5]], [[5], "x"]),
            *(["x"] * 1024, [[5]] * 1024, ["x"] * 2049, ["x"] * 16_385, [[5]] * 16_385, [""], ["x", ""], [[5, -1]]),
        ),
    ),
    "echo": Rule(_of(True, False)),
    "add_special_tokens": Rule(_of(True, False)),
    "add_generation_prompt": Rule(_of(True, False)),
    "chat_template_kwargs": Rule(
        _of({}, {"mood": "x"}, {"enable_thinking": False}, {"mood": None, "other": [1, {"a": "b"}]}),
        (
            *({name: "x"} for name in ("self", "messages", "loop", "caller", "tools", "template", "tokenizer")),
            *(
                {name: "x"}
                for name in ("bos_token", "varargs", "kwargs", "strict_compat", "range", "add_generation_prompt")
            ),
            *(
                {name: "x"}
                for name in ("raise_exception", "strftime_now", "m", "", "a b", "__class__", "l_0_m", "namespace")
            ),
            *({"mood": Raw("[" * depth + "]" * depth)} for depth in (50, 100, 150, 190, 250)),
            *({"mood": Raw('{"a":' * depth + "0" + "}" * depth)} for depth in (100, 190)),
            *({"mood": "x" * 100_000}, {"mood": "<s>"}, {"mood": ["<s>", {"</s>": "<s>"}]}, {"<s>": "<s>"}),
            *({"mood": Raw("1" * 5000)}, {"mood": 10**400}, {"mood": Raw('"\\ud800"')}, {"mood": Raw("NaN")}),
            {f"v{i}": i for i in range(10_000)},
        ),
    ),
    "tokens": Rule(lambda rng: _tokens(rng, 30), ([], [-1], [2**31], [VOCABULARY], [5] * 200_000, ["5"], [5.0])),
    # Of what is nested.
    "include_usage": Rule(_of(True, False)),
    "continuous_usage_stats": Rule(_of(True, False)),
    "reasoning_content": Rule(lambda rng: rng.choice([None, "", _texts(rng)])),
    "reasoning": Rule(lambda rng: rng.choice([None, _texts(rng)])),
    "role": Rule(_of("user"), ("tool", "function", "User", "users", "system\0", "<s>")),
    "content": Rule(
        lambda rng: _texts(rng),
        (
            *(
                [],
                [{"type": "text"}],
                [{"type": "text", "text": None}],
                [{"type": "image_url", "image_url": {"url": "x"}}],
            ),
            *([{"text": "x"}], ["x"], [{"type": "text", "text": "x", "more": 1}], [{"type": "text", "text": 5}]),
        ),
    ),
    "name": Rule(lambda rng: _texts(rng)),
    "type": Rule(_of("text"), ("Text", "image_url", "input_text")),
    "text": Rule(lambda rng: _texts(rng)),
}
NESTED_KINDS = (protocol.StreamOptions, protocol.ChatMessage, protocol.TextPart)
_UNKNOWN = ["max_token", "temperatur", "foo", "", "\0", "__class__", "model_fields", "self", "x" * 100_000, "promt"]


# ---- bodies -------------------------------------------------------------------------------------------------------


def valid_body(rng: random.Random, path: str) -> Body:
    if path == "/detokenize":
        return _some(rng, path, {"tokens": RULES["tokens"].valid(rng)})
    if path == "/tokenize":
        return _valid_tokenize(rng)
    needed = {"messages": RULES["messages"].valid(rng)} if "chat" in path else {"prompt": RULES["prompt"].valid(rng)}
    body = _some(rng, path, {**needed, "max_tokens": RULES["max_tokens"].valid(rng)})
    _agree(rng, path, body)
    return body


def _some(rng: random.Random, path: str, body: Body) -> Body:
    """`body` and some other fields with valid values."""
    names = [name for name in KINDS[path].model_fields if name not in body]
    for name in rng.sample(names, min(len(names), rng.choice([0, 1, 1, 2, 3, 5, 8]))):
        body[name] = None if rng.random() < 0.05 and _may_be_null(path, name) else RULES[name].valid(rng)
    return body


def _may_be_null(path: str, name: str) -> bool:
    found = KINDS[path].model_fields[name]
    return found.default is None and not found.is_required()


def _valid_tokenize(rng: random.Random) -> Body:
    if rng.random() < 0.5:
        body: Body = {"prompt": _texts(rng, 300)}
        if rng.random() < 0.5:
            body["add_special_tokens"] = rng.random() < 0.5
    else:
        body = {"messages": RULES["messages"].valid(rng)}
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            if rng.random() < 0.3:
                body[name] = RULES[name].valid(rng)
    if rng.random() < 0.3:
        body["model"] = "tiny"
    return body


def _agree(rng: random.Random, path: str, body: Body) -> None:
    """Makes a body valid whose fields are, each for itself."""
    beams = body.get("use_beam_search")
    if beams:
        off = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in (*off, "logit_bias", "allowed_token_ids", "bad_words", "stop"):
            body.pop(name, None)
        body["best_of"] = rng.choice([2, 3, 8, 32])
        body["n"] = rng.randint(1, body["best_of"])
        if len(body.get("stop_token_ids") or ()) > 60:  # leaves no room for so many beams
            del body["stop_token_ids"]
    else:
        for name in ("best_of", "length_penalty", "early_stopping"):
            body.pop(name, None)
    if beams or body.get("ignore_eos"):
        body.pop("repetition_detection", None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    elif body.get("prompt_logprobs") is not None:
        del body["prompt_logprobs"]
    if "chat" in path:
        if body.get("max_completion_tokens") is not None:
            body["max_tokens"] = body["max_completion_tokens"]
        if "top_logprobs" in body:
            body["logprobs"] = True
        elif "logprobs" in body:
            body["logprobs"] = rng.random() < 0.5
    if body.get("n") == 128 and isinstance(body.get("prompt"), list) and not isinstance(body["prompt"][0], int):
        body["n"] = 2
    # Where nothing could be drawn the request has an error of its own.
    bans = "bad_words" in body or body.get("min_tokens")
    if bans and body.get("allowed_token_ids"):
        del body["allowed_token_ids"]
    if body.get("min_tokens") and len(body.get("stop_token_ids") or ()) > 200:
        del body["stop_token_ids"]


def odd_value(rng: random.Random, name: str) -> Any:
    """For a field of that name: half the time a value that is odd for it, else one that is odd anywhere."""
    odd = RULES[name].odd if name in RULES else ()
    return rng.choice(odd) if odd and rng.random() < 0.5 else rng.choice(_ANYTHING)


def spoil(rng: random.Random, path: str, body: Body) -> str:
    """Puts one odd value into `body`; says which."""
    kind = rng.random()
    if kind < 0.05:
        name = rng.choice(_UNKNOWN)
        body[name] = rng.choice(_ANYTHING)
        return f"unknown {name[:20]!r}"
    if kind < 0.1:
        name = rng.choice(sorted(protocol._NOT_YET))
        body[name] = rng.choice(_ANYTHING)
        return name
    if kind < 0.13:
        name = rng.choice(sorted(name for name in body if isinstance(name, str)))
        del body[name]
        return f"no {name}"
    if kind < 0.16:
        name = rng.choice(sorted(name for name in body if isinstance(name, str)))
        body[name, 1] = odd_value(rng, name)
        return f"{name} twice"
    if kind < 0.22 and body.get("messages"):
        return _spoil_message(rng, body["messages"])
    if kind < 0.3:
        return _spoil_together(rng, body)
    name = rng.choice(sorted(KINDS[path].model_fields))
    body[name] = odd_value(rng, name)
    return name


def _spoil_message(rng: random.Random, messages: Any) -> str:
    if not isinstance(messages, list) or not isinstance(messages[0], dict):
        return "nothing"
    message = rng.choice(messages[:100])
    name = rng.choice(["role", "content", "name", *sorted(protocol._MESSAGE_NOT_YET), "foo"])
    if name == "content" and rng.random() < 0.5:
        part = {"type": "text", "text": "x"}
        inner = rng.choice(["type", "text", "foo"])
        part[inner] = odd_value(rng, inner)
        message["content"] = [{"type": "text", "text": "y"}, part]
        return f"messages.content.{inner}"
    message[name] = odd_value(rng, name)
    return f"messages.{name}"


def _spoil_together(rng: random.Random, body: Body) -> str:
    """Values that are odd in each other's company."""
    together: Body = rng.choice(
        [
            {"allowed_token_ids": [END], "min_tokens": 3, "max_tokens": 5},
            {"allowed_token_ids": [END], "logit_bias": {str(END): -100}},
            {"allowed_token_ids": [64, 65], "bad_words": ["a", "b"], "logit_bias": {"64": -100, "65": -100}},
            {"allowed_token_ids": [64, 65], "bad_words": [chr(i) for i in range(33, 127)]},
            {"bad_words": [chr(i) for i in range(1, 256)], "allowed_token_ids": list(range(256))},
            {"min_tokens": 12, "max_tokens": 3},
            {"min_tokens": 5, "stop_token_ids": list(range(VOCABULARY)), "max_tokens": 8},
            {"min_tokens": 5, "stop_token_ids": list(range(VOCABULARY)), "max_tokens": 3},
            {"temperature": 5e-324, "logit_bias": {"5": 100, "6": 100}},
            {"temperature": 2, "logit_bias": {str(t): 100 for t in range(VOCABULARY)}, "repetition_penalty": 1000},
            {"temperature": 1e-5, "repetition_penalty": 1000, "presence_penalty": 2, "top_p": 5e-324, "min_p": 1},
            {"repetition_penalty": 1e-3, "logit_bias": {"5": -100}, "frequency_penalty": -2, "n": 16},
            {"n": 128, "max_tokens": CONTEXT - 60},
            {"n": 128, "logprobs": 100, "max_tokens": 2},
            {"n": 128, "prompt_logprobs": 100, "max_tokens": 2},
            {"n": 128, "best_of": 128},
            {"use_beam_search": True, "n": 128},
            {"use_beam_search": True, "n": 32, "max_tokens": 100, "ignore_eos": True},
            {"use_beam_search": True, "best_of": 32, "stop_token_ids": list(range(200))},
            {"use_beam_search": True, "best_of": 4, "stop_token_ids": list(range(VOCABULARY))},
            {"use_beam_search": True, "best_of": 4, "min_tokens": 8, "max_tokens": 8, "length_penalty": -10},
            {"use_beam_search": True, "best_of": 4, "early_stopping": "never", "length_penalty": 10, "stream": True},
            {"use_beam_search": True, "best_of": 4, "n": 5},
            {"use_beam_search": True, "best_of": 4, "temperature": 1},
            {"use_beam_search": True, "best_of": 2, "logprobs": 100, "prompt_logprobs": 100},
            {"stream": True, "prompt_logprobs": 1},
            {"stream": True, "echo": True, "logprobs": 5, "n": 3},
            {"echo": True, "logprobs": 100, "prompt_logprobs": 0},
            {"stop": ["a"], "min_tokens": 8, "max_tokens": 8, "include_stop_str_in_output": True, "n": 8},
            {"stop": [chr(i) for i in range(32, 127)], "n": 128, "max_tokens": 4},
            {"priority": 2**70, "n": 64},
            {"max_tokens": None, "max_completion_tokens": None, "ignore_eos": True},
            {"seed": 2**64 - 1, "n": 128},
        ]
    )
    body.update(together)
    return "with ".join(f"{name} " for name in together).strip()


# ---- the schema ---------------------------------------------------------------------------------------------------


def by_schema(rng: random.Random, schema: Body, depth: int = 0) -> Any:
    """A value that /openapi.json allows: right in its types, odd in what no type says."""
    if "$ref" in schema:
        return by_schema(rng, _SCHEMAS[schema["$ref"].rsplit("/", 1)[-1]], depth)
    if "anyOf" in schema:
        return by_schema(rng, rng.choice(schema["anyOf"]), depth)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type", rng.choice(["string", "integer", "null", "array"] if depth < 5 else ["boolean"]))
    if kind == "object":
        return _object_by_schema(rng, schema, depth)
    if kind == "array":
        inner = schema.get("items", {})
        return [by_schema(rng, inner, depth + 1) for _ in range(rng.choice([0, 1, 1, 2, 3, 30]))]
    if kind == "integer":
        return rng.choice([rng.randint(-2, 20), rng.choice(_NUMBERS[:40]), 4.0])
    if kind == "number":
        return rng.choice([rng.randint(-2, 3), rng.uniform(-2, 2), rng.choice(_NUMBERS)])
    if kind == "string":
        return rng.choice([_texts(rng), *_SOME_TEXTS])
    return {"boolean": rng.random() < 0.5, "null": None}[kind]


def _object_by_schema(rng: random.Random, schema: Body, depth: int) -> Body:
    inner = schema.get("additionalProperties")
    if "properties" not in schema:
        inner = inner if isinstance(inner, dict) else {}
        return {_texts(rng, 6): by_schema(rng, inner, depth + 1) for _ in range(rng.randint(0, 3))}
    required = schema.get("required", [])
    # Few at a time, else one of them always refuses the request.
    likely = rng.choice([0.0, 0.05, 0.3])
    names = [name for name in schema["properties"] if name in required or rng.random() < likely]
    return {name: by_schema(rng, schema["properties"][name], depth + 1) for name in names}


# ---- HTTP ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Request:
    """One request: `pieces` are written one after the other.

    `valid`: it must be answered with 200. `leaves_after`: the client goes away when so many bytes of the answer have
    come. `num_answers` come, of which a broken connection may leave out the last. `alone`: nothing can follow it.
    """

    number: int
    what: str
    path: str
    pieces: list[bytes]
    method: str = "POST"
    valid: bool = False
    leaves_after: int | None = None
    num_answers: int = 1
    alone: bool = False
    body: Body = field(default_factory=dict)


def request(seed: int, number: int) -> Request:
    """Request `number` of a seed."""
    rng = random.Random(f"{seed}/{number}")
    path = rng.choices(list(KINDS), _WEIGHTS)[0]
    body = valid_body(rng, path)
    kind = rng.random()
    if kind < 0.08:
        body = by_schema(rng, {"$ref": f"#/components/schemas/{KINDS[path].__name__}"})
        return _sent(rng, Request(number, f"by schema {' '.join(sorted(body))}"[:200], path, [], body=body))
    if kind < 0.42:
        return _sent(rng, Request(number, "valid", path, [], valid=True, body=body))
    if kind < 0.75:
        what = spoil(rng, path, body)
        return _sent(rng, Request(number, f"odd {what}", path, [], body=body))
    if kind < 0.83:
        what = f"{spoil(rng, path, body)}, {spoil(rng, path, body)}"
        return _sent(rng, Request(number, f"odd {what}", path, [], body=body))
    if kind < 0.92:
        return _odd_body(rng, number, path, encode(body).encode())
    return _odd_http(rng, number, path, encode(body).encode())


def _sent(rng: random.Random, made: Request) -> Request:
    content = encode(made.body).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.08:
        made.leaves_after = rng.choice([0, 1, 50, 200, 1000])
        made.what += f", leaves after {made.leaves_after} bytes"
        made.pieces = [request_bytes("POST", made.path, content, "Connection: close\r\n")]
        return made
    if kind < 0.16:
        made.pieces = _chunked(rng, made.path, content)
        made.what += ", chunked"
        return made
    if kind < 0.19:
        whole = request_bytes("POST", made.path, content)
        cut = rng.randrange(1, len(whole))
        made.pieces = [whole[:cut], whole[cut:]]
        return made
    if kind < 0.22:
        made.pieces = [request_bytes("POST", made.path, content) * 3]
        made.num_answers = 3
        made.what += ", pipelined"
        return made
    kinds = ["application/json", "APPLICATION/JSON", "application/json; charset=latin-1", "application/x.y+json"]
    made.pieces = [request_bytes("POST", made.path, content, f"Content-Type: {rng.choice(kinds)}\r\n")]
    return made


def _chunked(rng: random.Random, path: str, content: bytes) -> list[bytes]:
    size = max(1, len(content) // rng.randint(1, 5))
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    return [head.encode(), *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def _odd_body(rng: random.Random, number: int, path: str, content: bytes) -> Request:
    bodies: list[tuple[str, Callable[[], bytes]]] = [
        ("truncated", lambda: content[: rng.randrange(len(content))]),
        ("invalid UTF-8", lambda: content.replace(b'"', b'"\xff', 1)),
        ("invalid UTF-8 in a value", lambda: content[:-1] + b',"user":"\xc3\x28\xed\xa0\x80"}'),
        ("lone surrogate as a key", lambda: content[:-1] + b',"\\ud800":1}'),
        ("BOM", lambda: b"\xef\xbb\xbf" + content),
        ("UTF-16", lambda: content.decode().encode("utf-16")),
        ("brackets", lambda: b"[" * 10_000),
        ("nested", lambda: NESTED.text.encode()),
        ("objects", lambda: b'{"a":' * 10_000),
        ("nested value", lambda: content[:-1] + b',"logit_bias":' + NESTED.text.encode() + b"}"),
        ("huge number", lambda: content[:-1] + b',"seed":' + b"9" * 100_000 + b"}"),
        ("huge exponent", lambda: content[:-1] + b',"temperature":1e' + b"9" * 1000 + b"}"),
        ("all fields twice", lambda: content[:-1] + b"," + content[1:]),
        ("thousand keys", lambda: content[:-1] + b"".join(b',"k%d":1' % i for i in range(1000)) + b"}"),
        ("trailing", lambda: content + rng.choice([b"x", b"}", b",", b"\0", b" \n", content])),
        ("leading", lambda: rng.choice([b"\0", b" \n\t", b"\x0b", b"data: "]) + content),
        ("comment", lambda: b"/* x */" + content),
        ("single quotes", lambda: content.replace(b'"', b"'")),
        ("no object", lambda: rng.choice([b"", b" ", b"null", b"true", b"1", b'"x"', b"[]", b"[{}]", b"{}", b"\0"])),
        ("random bytes", lambda: rng.randbytes(rng.randint(1, 300))),
        ("flipped byte", lambda: _flipped(rng, content)),
        ("control characters", lambda: content.replace(b":", b":\x01", 1)),
        ("many values", lambda: b'{"prompt":[' + b"5," * 700_000 + b"5]}"),
        ("form", lambda: b"prompt=hello&max_tokens=5"),
    ]
    what, make = rng.choice(bodies)
    made = make()
    pieces = _chunked(rng, path, made) if rng.random() < 0.2 and made else [request_bytes("POST", path, made)]
    return Request(number, f"body: {what}", path, pieces)


def _flipped(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def _odd_http(rng: random.Random, number: int, path: str, content: bytes) -> Request:
    whole = request_bytes("POST", path, content)
    post = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    method = rng.choice(["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
    other = rng.choice(["/", "/v1", "/v1/chat/completion", "/v1/models/x", "/v1/models/%00%ff", "/v1//completions"])
    other = rng.choice([other, path + "/", path + "?a=b&c", "/" + "x" * 5000, "/%e4%b8", "/v1/models/" + "y" * 3000])
    kind = rng.choice(["text/plain", "application/x-www-form-urlencoded", "", "application/", "json", "x" * 5000])
    coding = rng.choice(["gzip", "identity", "br, gzip", "x" * 5000])
    host = rng.choice(["evil.example", "", "[::1", "[::1]:80", "localhost.:1", "x" * 5000, ":80", "1.2.3.4.5"])
    odd: list[tuple[str, bytes, dict[str, Any]]] = [
        ("method", request_bytes(method, path, content), {"method": method}),
        ("method without a body", request_bytes(method, path), {"method": method}),
        ("path", request_bytes("POST", other, content), {}),
        ("GET of a path", request_bytes("GET", other), {"method": "GET"}),
        ("unknown method", whole.replace(b"POST", b"BREW", 1), {"alone": True}),
        ("no length", post + b"\r\n", {}),
        ("length too large", post + b"Content-Length: %d\r\n\r\n" % (len(content) + 5) + content, {"leaves_after": 0}),
        ("length too small", post + b"Content-Length: %d\r\n\r\n" % (len(content) // 2) + content, {"alone": True}),
        ("length of 10 GB", post + b"Content-Length: 10000000000\r\n\r\n" + content, {"alone": True}),
        ("length below 0", post + b"Content-Length: -5\r\n\r\n" + content, {"alone": True}),
        ("length no number", post + b"Content-Length: x\r\n\r\n" + content, {"alone": True}),
        ("length twice", post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + content, {"alone": True}),
        ("length of 400 digits", post + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n", {"alone": True}),
        ("body of 5 MB", request_bytes("POST", path, b" " * 5_000_000 + content), {"alone": True}),
        ("chunk without size", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {"alone": True}),
        ("chunk too large", post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n", {"alone": True}),
        ("unknown coding", post + b"Transfer-Encoding: gzip\r\n\r\n" + content, {"alone": True}),
        (
            "coding and length",
            post + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            {"alone": True},
        ),
        ("headers of 70 KB", request_bytes("POST", path, content, f"X: {'x' * 70_000}\r\n"), {"alone": True}),
        ("many headers", request_bytes("POST", path, content, "".join(f"X{i}: 1\r\n" for i in range(2000))), {}),
        ("headers as bytes", whole.replace(b"Host: localhost", b"Host: \xff\xfe", 1), {"alone": True}),
        ("header with a NUL", whole.replace(b"Host: localhost", b"Host: \0", 1), {"alone": True}),
        ("header without colon", whole.replace(b"Host: localhost", b"Host", 1), {"alone": True}),
        ("content type", request_bytes("POST", path, content, f"Content-Type: {kind}\r\n"), {}),
        ("content coding", request_bytes("POST", path, content, f"Content-Encoding: {coding}\r\n"), {}),
        ("host", whole.replace(b"Host: localhost", f"Host: {host}".encode(), 1), {}),
        ("key", request_bytes("POST", path, content, "Authorization: Bearer \xff\r\n"), {}),
        ("expects 100", request_bytes("POST", path, content, "Expect: 100-continue\r\n"), {}),
        (
            "upgrade",
            request_bytes("POST", path, content, "Upgrade: websocket\r\nConnection: Upgrade\r\n"),
            {"alone": True},
        ),
        ("HTTP/1.0", whole.replace(b"HTTP/1.1", b"HTTP/1.0", 1), {"alone": True}),
        ("HTTP/9.9", whole.replace(b"HTTP/1.1", b"HTTP/9.9", 1), {"alone": True}),
        ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {"alone": True}),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200), {"alone": True}),
        ("random bytes", rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n", {"alone": True}),
        ("a target that is no path", whole.replace(path.encode(), b"http://x/" + path.encode(), 1), {}),
        ("half a head", whole[:15], {"leaves_after": 0}),
        ("half a body", whole[: len(whole) - len(content) // 2 - 1], {"leaves_after": 0}),
        ("nothing", b"", {"leaves_after": 0}),
        ("another's end", request_bytes("POST", path, content, "Connection: close\r\n") * 2, {"alone": True}),
    ]
    what, sent, more = rng.choice(odd)
    return Request(number, f"HTTP: {what}", path, [sent], **more)


def requests(seed: int, numbers: range | list[int]) -> Iterator[Request]:
    return (request(seed, number) for number in numbers)
