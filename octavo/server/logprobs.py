"""Logprobs as numbers that JSON can hold, in the order that clients expect. Shapes belong to the endpoints."""

from typing import Any

from octavo.errors import RequestError
from octavo.request import Logprob

_LEAST = -9999.0  # JSON has no minus infinity; vLLM sends this for it too
# In one answer, each of which is some 80 bytes of it. Each choice has those of its prompt, so that a short request may
# ask for far more than its own tokens cost.
MAX_PROMPT_LOGPROBS = 1_000_000


def check_prompt_logprobs(count: int | None, num_tokens: int, n: int) -> None:
    """Raises `RequestError` if `count` logprobs for each of `num_tokens` prompt tokens, `n` times, are too many."""
    if count is not None and (entries := (count + 1) * num_tokens * n) > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs is {count}, which for {num_tokens} tokens and n = {n} makes an answer of {entries}"
            f" entries, above {MAX_PROMPT_LOGPROBS}; lower prompt_logprobs or n, or send shorter prompts",
            "prompt_logprobs",
        )


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
