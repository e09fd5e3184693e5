"""Chats in ms-swift's two notations: messages with roles, and a history of pairs with a query."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import RequestError


def history_to_messages(
    history: Sequence[Sequence[str | None]],
    system: str | None = None,
    roles: Sequence[Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Messages of a history; `roles` are pairs too (user and assistant by default), a None is left out."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for index, turn in enumerate(history):
        pair = roles[index] if roles is not None else ("user", "assistant")
        messages += [{"role": role, "content": text} for role, text in zip(pair, turn, strict=True) if text is not None]
    return messages


def messages_to_history(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """system, history, history_roles, query, query_role, response, response_role of a chat; raises `RequestError`.

    After a system message, if there is one, a user (or a tool) and the assistant take turns; the last pair is query
    and response, whose answer may be missing.
    """
    rest = list(messages)
    system = None
    if rest and rest[0].get("role") == "system":
        system = _text_of(rest[0], "messages[0]")
        rest = rest[1:]
    first = len(messages) - len(rest)
    turns: list[list[str | None]] = []
    roles: list[list[str]] = []
    for index, message in enumerate(rest):
        where = f"messages[{first + index}]"
        role = message.get("role")
        expected = ("user", "tool") if index % 2 == 0 else ("assistant",)
        if role not in expected:
            raise RequestError(f"{where}.role is {role!r}; here it must be {' or '.join(expected)}", "messages")
        if index % 2 == 0:
            turns.append([_text_of(message, where), None])
            roles.append([str(role), "assistant"])
        else:
            turns[-1][1] = _text_of(message, where)
    if not turns:
        raise RequestError("messages has no message of the user; give at least one", "messages")
    (query, response), (query_role, response_role) = turns.pop(), roles.pop()
    return {
        "history": turns,
        "history_roles": roles,
        "query": query,
        "query_role": query_role,
        "response": response,
        "response_role": response_role,
        "system": system,
    }


def _text_of(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content is {content!r}; it must be a text or text parts", "messages")
    return content
