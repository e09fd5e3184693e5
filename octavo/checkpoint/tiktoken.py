"""Qwen v1's vocabulary file `qwen.tiktoken`: a line a token, its bytes in base64 and its rank.

The rank is the token's id and the order in which pairs merge. The special tokens stand in no file: their ids
follow the ranks.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError

FILE_NAME = "qwen.tiktoken"
MOST_BYTES = 256 * 1024**2  # of the file; the real one has 2.5 MB
MOST_TOKEN_BYTES = 4096  # the longest of real vocabularies have some 200; merges take the square of it
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def is_chat(generation_config: Mapping[str, Any]) -> bool:
    """Whether the model was made to talk in ChatML; a base model's file says `raw`."""
    return generation_config.get("chat_format") == "chatml"


def end_ids(num_ranks: int, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends an answer, most usual first.

    generation_config.json names endoftext alone; that im_end and im_start end a chat model's turn stands only in the
    model's own code.
    """
    return (num_ranks + 2, num_ranks + 1, num_ranks) if is_chat(generation_config) else (num_ranks,)


def read_ranks(path: Path) -> list[bytes]:
    """The tokens' bytes by rank; raises `CheckpointError` if a line is damaged or a rank is missing."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} has more than {MOST_BYTES} bytes, which is no vocabulary; fetch it again")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; fetch it again") from None
    ranks: list[bytes] = []
    for line in filter(None, lines):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            in_order = int(rank) == len(ranks) and 0 < len(token) <= MOST_TOKEN_BYTES
        except (ValueError, binascii.Error):
            in_order = False
        if not in_order:
            raise CheckpointError(f"{path}: line {len(ranks) + 1} does not hold token {len(ranks)}; fetch it again")
        ranks.append(token)
    if len(set(ranks)) < len(ranks):
        raise CheckpointError(f"{path} gives the same token twice; fetch it again")
    if missing := set(map(bytes, zip(range(256)))) - set(ranks):
        raise CheckpointError(f"{path} lacks tokens for {len(missing)} of the 256 bytes; fetch it again")
    return ranks
