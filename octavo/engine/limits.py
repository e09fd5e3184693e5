"""What a request may ask of this engine. Checked where the request is made, so that a mistake costs no step.

The HTTP process holds the same `Limits` as the engine process and refuses there, before anything crosses the pipe.
"""

from collections.abc import Collection
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Lengths in tokens, memory in blocks of `block_size` tokens."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int

    @classmethod
    def of(cls, config: EngineConfig) -> "Limits":
        return cls(
            vocab_size=config.model.num_tokens or config.model.vocab_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
        )

    def max_tokens(self, request: Request) -> int:
        """The most tokens that one sample of `request` may generate."""
        room = self.max_model_len - len(request.prompt_token_ids)
        wanted = request.params.max_tokens
        return room if wanted is None else min(wanted, room)

    def room(self, num_prompt: int, n: int) -> int:
        """The most tokens that each of `n` sequences may have after a prompt of `num_prompt`; 0 or less if none fits.

        The sequences share the prompt's full blocks; all together must fit the context and the cache.
        """
        shared = num_prompt // self.block_size
        cached = ((self.num_blocks - shared) // n + shared) * self.block_size
        return min(self.max_model_len, cached) - num_prompt

    def check(self, request: Request) -> None:
        """Raises `RequestError` if `request` could never run here, naming the numbers."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but this context of {self.max_model_len} must hold"
                " the prompt and one new token; shorten the prompt or raise --max-model-len",
                "prompt",
            )
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"max_tokens is {params.max_tokens} and the prompt has {len(prompt)} tokens, together more than the"
                f" context of {self.max_model_len}; set max_tokens to {self.max_model_len - len(prompt)} or less",
                "max_tokens",
            )
        if params.num_sequences > self.max_num_seqs:
            name = "beam_width" if params.beams else "n"
            raise RequestError(
                f"{name} is {params.num_sequences}, but at most {self.max_num_seqs} sequences run at once"
                " (--max-num-seqs)",
                name,
            )
        # So that a beam always has somewhere to go, whatever tokens end it.
        widest = self.vocab_size // 2 - len(params.stop_token_ids)
        if params.beams and params.beam_width > widest:
            raise RequestError(
                f"beam_width is {params.beam_width}, too wide for a vocabulary of {self.vocab_size} tokens with"
                f" {len(params.stop_token_ids)} stop_token_ids; set it to {max(0, widest)} or less",
                "beam_width",
            )
        self._check_blocks(request)
        self.check_ids("prompt", prompt)
        self.check_ids("stop_token_ids", params.stop_token_ids)
        self.check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self.check_ids("logit_bias", params.logit_bias or ())

    def _check_blocks(self, request: Request) -> None:
        """The samples or beams of a request share the prompt's full blocks; all together must fit the cache."""
        prompt, n = len(request.prompt_token_ids), request.params.num_sequences
        shared = prompt // self.block_size
        each = -(-(prompt + self.max_tokens(request)) // self.block_size) - shared
        if shared + n * each <= self.num_blocks:
            return
        room = self.room(prompt, n)
        name, kind = ("beam_width", "beams") if request.params.beams else ("n", "samples")
        fix = f"set max_tokens to {room} or less" if room > 0 else f"lower {name} or shorten the prompt"
        raise RequestError(
            f"{n} {kind} of up to {prompt + self.max_tokens(request)} tokens need {shared + n * each} KV blocks of"
            f" {self.block_size} tokens, but there are {self.num_blocks}; {fix}",
            "max_tokens" if room > 0 else name,
        )

    def check_ids(self, name: str, ids: Collection[int]) -> None:
        """Raises `RequestError` for the first of `ids`, field `name`, that is outside the vocabulary."""
        # A long prompt is looked through twice in C and not once in Python.
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"{name} holds token id {token}, outside the vocabulary of {self.vocab_size}", name)
