"""A chat template at work: history, query and system prompt to token ids, piece by piece.

Neighbouring texts are joined and tokenized as one segment; every historical answer and every run of raw ids is a
segment of its own, because that is how models of this family were trained and it changes the ids. Which kinds of
templates there are, `template_table` knows.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.errors import ConfigError, RequestError, nearest
from octavo.swift.template_table import Segment, Segments, TemplateFacts
from octavo.swift.tokenizer import HfTokenizer
from octavo.swift.tools import render_tools
from octavo.text.origin import joined, own
from octavo.text.special_text import encode_traced

TruncationStrategy = Literal["delete", "truncation_left"]
STRATEGIES = ("delete", "truncation_left")
MEDIA = ("images", "videos", "audios", "objects")
_PLACES = re.compile(r"(\{\{SYSTEM\}\}|\{\{QUERY\}\})")


@dataclass(frozen=True, slots=True)
class _Text:
    """A piece of a prompt; `trusted` if the template wrote it, so that its special tokens are meant."""

    text: str
    trusted: bool


_Piece = _Text | tuple[int, ...]


class Template:
    """How a chat is written; of no use until `get_template` has bound a copy of it to a tokenizer.

    The first six parameters are lists of segments as `template_table` describes them (a list in place of a tuple is
    taken); a `prefix` that holds {{SYSTEM}} is the form with a system prompt, and without it where there is none.
    """

    def __init__(
        self,
        prefix: Sequence[Any],
        prompt: Sequence[Any],
        chat_sep: Sequence[Any] | None,
        suffix: Sequence[Any],
        default_system: str | None = None,
        system_prefix: Sequence[Any] | None = None,
        auto_add_bos: bool = False,
        tools_prompt: str = "react_en",
        tool_prompt: Sequence[Any] | None = None,
    ):
        opening, with_system = _segments(prefix), None if system_prefix is None else _segments(system_prefix)
        if any("{{SYSTEM}}" in part for part in opening):
            assert with_system is None, "prefix holds {{SYSTEM}} already; leave system_prefix out"
            with_system = opening
            parts = [
                part.replace("{{SYSTEM}}", "") for part in opening if isinstance(part, str) and "{{SYSTEM}}" in part
            ]
            opening = tuple(part for part in parts if part)
        self._set_facts(
            TemplateFacts(
                prefix=opening,
                prompt=_segments(prompt),
                chat_sep=None if chat_sep is None else _segments(chat_sep),
                suffix=_segments(suffix),
                default_system=default_system or None,
                system_prefix=with_system,
                auto_bos=auto_add_bos,
                tools_prompt=tools_prompt,
                tool_prompt=None if tool_prompt is None else _segments(tool_prompt),
            )
        )

    @classmethod
    def from_facts(cls, facts: TemplateFacts, template_type: str | None = None) -> "Template":
        template = cls.__new__(cls)
        template._set_facts(facts)
        template.template_type = template_type
        return template

    def _set_facts(self, facts: TemplateFacts) -> None:
        assert facts.default_system is None or facts.has_system, "this template has no place for a system prompt"
        self.facts = facts
        self.default_system = facts.default_system
        self.template_type: str | None = None
        self.tokenizer: HfTokenizer | None = None
        self.max_length: int | None = None
        self.truncation_strategy: TruncationStrategy = "delete"
        self.tools_prompt = facts.tools_prompt
        self.strict_compat = False

    # ---- what users of ms-swift read ----------------------------------------------------------------------

    @property
    def is_generation(self) -> bool:
        return self.facts.is_generation

    @property
    def support_multi_round(self) -> bool:
        return self.facts.chat_sep is not None

    @property
    def suffix(self) -> list[str | list[int]]:
        """The segments that end an answer; names of ids are filled in once the template is bound."""
        return [part if isinstance(part, str) else list(self._ids(part)) for part in self.facts.suffix]

    # ---- binding ------------------------------------------------------------------------------------------

    def bind(
        self,
        tokenizer: HfTokenizer,
        default_system: str | None,
        max_length: int | None,
        truncation_strategy: TruncationStrategy,
        *,
        tools_prompt: str | None,
        strict_compat: bool,
    ) -> None:
        """Makes this copy the template of one tokenizer, once."""
        assert self.tokenizer is None, "the template has been initialized; get a new one with get_template"
        if default_system:
            assert self.facts.has_system, f"template {self.template_type!r} does not take a system prompt"
        if truncation_strategy not in STRATEGIES:
            raise ConfigError(f"truncation_strategy is {truncation_strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1, or None for no limit")
        if default_system is not None:
            self.default_system = default_system or None
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.tools_prompt = tools_prompt or self.facts.tools_prompt
        self.strict_compat = strict_compat
        slips: dict[str, Any] = dict(self.facts.faithful) if strict_compat else {}
        facts = replace(self.facts, **slips)
        today = datetime.datetime.now().astimezone().strftime("%d %b %Y")
        changed: dict[str, Any] = {}
        for name in ("prefix", "system_prefix"):
            parts: Segments | None = getattr(facts, name)
            if parts is not None:
                parts = tuple(part.replace("{{DATE}}", today) if isinstance(part, str) else part for part in parts)
                if facts.own_prefix:
                    parts = (tuple(tokenizer.encode("")), *parts)
                changed[name] = parts
        self.facts = replace(facts, **changed)

    # ---- encoding -----------------------------------------------------------------------------------------

    def encode(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """({"input_ids": ...}, {}) of a request, or ({}, {}) if it is longer than `max_length` and to be deleted.

        Keys of a request: query, history, system (absent or None: the template's; empty: none), tools, history_roles,
        query_role. Raises `RequestError`.
        """
        bound = self._bound()
        ids: list[int] = []
        for segment in _join(self._pieces(request)):
            ids += list(segment) if isinstance(segment, tuple) else self._tokenize(bound, segment)
        if self.max_length is not None and len(ids) > self.max_length:
            if self.truncation_strategy == "delete":
                return {}, {}
            ids = ids[-self.max_length :]
        return {"input_ids": ids}, {}

    def _pieces(self, request: Mapping[str, Any]) -> list[_Piece]:
        """The prompt in pieces; an empty tuple of ids separates what must not be joined."""
        _check(request)
        facts, system = self.facts, self._system(request)
        history = [*(request.get("history") or ()), (request.get("query") or "", None)]
        roles = [*(request.get("history_roles") or ()), (request.get("query_role") or "user", "assistant")]
        if len(roles) < len(history):
            roles = [("user", "assistant")] * (len(history) - len(roles)) + roles
        if len(history) > 1:
            assert self.support_multi_round, f"template {self.template_type!r} is for single turns; leave history out"
        in_turn = any("{{SYSTEM}}" in part for part in facts.prompt)
        pieces: list[_Piece] = []
        if facts.auto_bos:
            bos = self._bound().bos_token_id
            if bos is not None and bos in self._bound().encode(""):
                pieces.append((bos,))
        opening = facts.prefix if system is None or in_turn else facts.system_prefix
        pieces += self._filled(opening or (), system, "", 0)
        for turn, (query, answer) in enumerate(history):
            last = turn == len(history) - 1
            prompt = facts.tool_prompt or facts.prompt if roles[turn][0] == "tool" else facts.prompt
            parts = tuple(part for part in prompt if "{{SYSTEM}}" not in part or (last and system is not None))
            if query or answer:
                pieces += self._filled(parts, system, query or "", turn)
            if not last and (query or answer):
                pieces += [(), _Text(answer or "", False), ()]
                if history[turn + 1][0]:
                    pieces += self._filled(facts.chat_sep or (), system, "", turn)
        if facts.response_prefix and history[-1][0]:
            pieces.append(_Text(facts.response_prefix, True))
        return pieces

    def _system(self, request: Mapping[str, Any]) -> str | None:
        system: str | None = request.get("system")
        if system is None:
            system = self.default_system
        elif system:
            assert self.facts.has_system, f"template {self.template_type!r} does not take a system prompt"
        tools = request.get("tools")
        if tools:
            assert self.facts.has_system, f"template {self.template_type!r} has no place for tools"
            system = (system or "") + render_tools(tools, self.tools_prompt)
        return system or None

    def _filled(self, parts: Iterable[Segment], system: str | None, query: str, turn: int) -> list[_Piece]:
        """Segments with their placeholders filled in; what is filled in is not trusted."""
        filled: list[_Piece] = []
        values = {"{{SYSTEM}}": system or "", "{{QUERY}}": query}
        for part in parts:
            if isinstance(part, tuple):
                filled.append(self._ids(part))
                continue
            part = part.replace("{{ROUND0}}", str(turn)).replace("{{ROUND1}}", str(turn + 1))
            for text in _PLACES.split(part):
                if text:
                    filled.append(_Text(values.get(text, text), text not in values))
        return filled

    def _ids(self, part: tuple[int | str, ...]) -> tuple[int, ...]:
        """Raw ids, their names looked up in the tokenizer."""
        found: list[int] = []
        for item in part:
            index = getattr(self._bound(), item) if isinstance(item, str) else item
            if index is None:
                raise ConfigError(
                    f"template {self.template_type!r} needs {item}, which this model's tokenizer lacks; set it on the"
                    " tokenizer or choose another template"
                )
            found.append(index)
        return tuple(found)

    def _tokenize(self, tokenizer: HfTokenizer, parts: list[_Text]) -> list[int]:
        """Token ids of one segment. A special token that somebody wrote into a message stays text."""
        inner = tokenizer.inner
        special = inner.special_text
        foreign = [part.text for part in parts if not part.trusted]
        trusted = [part.text for part in parts if part.trusted]
        if self.strict_compat or not (special.could_begin_in(foreign) or special.could_end_elsewhere(trusted)):
            return inner.encode("".join(part.text for part in parts), add_bos=False)
        return encode_traced(inner, joined(own(part.text) if part.trusted else part.text for part in parts))

    def _bound(self) -> HfTokenizer:
        if self.tokenizer is None:
            raise ConfigError("the template is not bound to a tokenizer; get one with octavo.swift.get_template")
        return self.tokenizer

    # ---- the end of an answer -----------------------------------------------------------------------------

    def stop_texts(self) -> list[str]:
        """Texts that end an answer: the tokenizer's EOS and the last segment of the suffix."""
        tokenizer = self._bound()
        last = self.suffix[-1]
        texts = [tokenizer.eos_token, last if isinstance(last, str) else tokenizer.decode(last)]
        return list(dict.fromkeys(text for text in texts if text))

    def held_tokens(self) -> int:
        """Tokens at the end of an unfinished answer that may still turn out to be its suffix."""
        last = self.suffix[-1]
        return 1 + (0 if isinstance(last, str) else len(last))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Template":
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        # A tokenizer is shared, not copied: it is large and nobody writes into it.
        copy.__dict__ = {k: v if k == "tokenizer" else deepcopy(v, memo) for k, v in self.__dict__.items()}
        return copy


def _segments(given: Sequence[Any]) -> Segments:
    return tuple(part if isinstance(part, str) else tuple(part) for part in given)


def _join(pieces: Iterable[_Piece]) -> list[list[_Text] | tuple[int, ...]]:
    """Neighbouring texts together; ids apart."""
    joined: list[list[_Text] | tuple[int, ...]] = []
    for piece in pieces:
        if isinstance(piece, tuple):
            joined.append(piece)
        elif joined and isinstance(joined[-1], list):
            joined[-1].append(piece)
        else:
            joined.append([piece])
    return joined


_KEYS = {"query", "history", "system", "tools", "history_roles", "query_role", *MEDIA}


def _check(request: Mapping[str, Any]) -> None:
    """Refuses what would otherwise fail deep inside, or be ignored."""
    for name in request:
        if name not in _KEYS:
            raise RequestError(f"{name} is not a part of a request.{nearest(name, _KEYS)}", name)
    for name in MEDIA:
        if request.get(name):
            raise RequestError(f"{name} is given, but Octavo takes text only; leave it out", name)
    for name in ("query", "system"):
        if request.get(name) is not None and not isinstance(request[name], str):
            raise RequestError(f"{name} is of type {type(request[name]).__name__}; it must be a text", name)
    for index, turn in enumerate(request.get("history") or ()):
        whole = isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
        if not whole or not all(part is None or isinstance(part, str) for part in turn):
            raise RequestError(f"history[{index}] is {turn!r}; it must be a pair of texts: query, answer", "history")
