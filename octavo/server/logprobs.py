"""Logprobs as numbers that JSON can hold, in the order that clients expect. Shapes belong to the endpoints."""

from typing import Any

from octavo.request import Logprob

_LEAST = -9999.0  # JSON has no minus infinity; vLLM sends this for it too


def finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def most_likely(entry: dict[int, Logprob], count: int) -> list[int]:
    """The `count` most likely token ids of a position; the drawn token is among them only by its rank."""
    return sorted(entry, key=lambda token: -entry[token].logprob)[:count]


def prompt_logprobs_json(entries: list[dict[int, Logprob] | None]) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's shape: an object by token id for each prompt token, null for the first."""
    return [None if entry is None else {str(token): _token(x) for token, x in entry.items()} for entry in entries]


def _token(logprob: Logprob) -> dict[str, Any]:
    return {"logprob": finite(logprob.logprob), "rank": logprob.rank, "decoded_token": logprob.decoded_token}
