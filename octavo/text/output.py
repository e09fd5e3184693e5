"""Tokens from the engine to what a caller reads: text and its deltas, stop strings, logprobs with their
words.

Used by the offline `LLM` and by the HTTP process alike; knows neither the engine nor HTTP. Per token, the
work does not grow with the length of the answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.errors import OctavoError
from octavo.request import (
    BeamScore,
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    TokenLogprobs,
    TokenOutput,
)
from octavo.text.detokenizer import Detokenizer
from octavo.text.repetition import repeats
from octavo.text.stop_strings import Match, StopStrings
from octavo.text.tokenizer import Tokenizer


@dataclass(slots=True)
class TextDelta:
    """What one token added to one sequence. `token_ids` is empty when the token came after the end.

    `abort` is true when a stop string ended a sequence that the engine still runs: the caller must abort it
    there.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    # Of an answer of a beam search, at its end: see CompletionOutput.
    cumulative_logprob: float | None = None
    beam_score: float | None = None
    abort: bool = False


class RequestText:
    """The answer to one request, all its sequences.

    `push` each `TokenOutput` of the request; `result` at any time. The deltas of a sequence joined are its
    text.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None = None):
        self.request = request
        self.prompt = prompt
        self.num_cached_tokens = 0
        self.error: OctavoError | None = None
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        # What has come of them since they were last made: thousands of objects for each step of a long prompt.
        self._new_prompt_logprobs: list[tuple[int, Iterable[TokenLogprobs]]] = []
        self._sequences = [_SequenceText(request, tokenizer, index) for index in range(request.params.n)]

    @property
    def finished(self) -> bool:
        return all(sequence.output.finish_reason is not None for sequence in self._sequences)

    def push(self, output: TokenOutput) -> TextDelta:
        """Take one token of one sequence; tokens after a sequence's end are ignored."""
        _, index, token_id, finish_reason, stop_token_id, logprobs = output
        return self._sequences[index].push(token_id, finish_reason, stop_token_id, logprobs)

    def finish(self, index: int, reason: FinishReason) -> TextDelta:
        """End a sequence without a token: "abort", "error", or "length" when the engine had no room for one.

        The delta is what was held back. Nothing happens to a sequence that has ended.
        """
        return self._sequences[index].finish(reason)

    def fail(self, error: OctavoError) -> list[TextDelta]:
        """End what has not ended with the request's own `error`."""
        self.error = error
        return [self.finish(i, "error") for i, one in enumerate(self._sequences) if one.output.finish_reason is None]

    def put_beam_score(self, scored: BeamScore) -> None:
        """Take the score of an answer of a beam search, before the answer's last token."""
        _, index, cumulative_logprob, score = scored
        self._sequences[index].scores = (cumulative_logprob, score)

    def put_prompt_logprobs(self, start: int, entries: Iterable[TokenLogprobs]) -> None:
        """Take the logprobs of the prompt tokens that follow positions `start` and on; the first token has none."""
        self._new_prompt_logprobs.append((start, entries))

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """One entry a prompt token; None if there are none. They are made when they are asked for."""
        if self._new_prompt_logprobs and self._prompt_logprobs is None:
            self._prompt_logprobs = [None] * len(self.request.prompt_token_ids)
        for start, entries in self._new_prompt_logprobs:
            assert self._prompt_logprobs is not None
            for position, entry in enumerate(entries, start + 1):
                self._prompt_logprobs[position] = to_logprobs(self._tokenizer, entry)
        self._new_prompt_logprobs.clear()
        return self._prompt_logprobs

    def outputs(self) -> list[CompletionOutput]:
        """The answers as far as they go, as in `result`."""
        return [sequence.completion() for sequence in self._sequences]

    def result(self) -> RequestOutput:
        """The answer as far as it goes. The lists in it are this object's own and grow with it."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=self.outputs(),
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs(),
            num_cached_tokens=self.num_cached_tokens,
            error=None if self.error is None else str(self.error),
        )


class _SequenceText:
    """One sequence of a request."""

    __slots__ = (
        "_detokenizer",
        "_min_tokens",
        "_pieces",
        "_repetition",
        "_stop_strings",
        "_tokenizer",
        "_with_stop",
        "output",
        "scores",
    )

    def __init__(self, request: Request, tokenizer: Tokenizer, index: int):
        params = request.params
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, continued=bool(request.prompt_token_ids))
        self._stop_strings = StopStrings(params.stop)
        self._repetition = params.repetition_detection
        self._min_tokens = params.min_tokens
        self._with_stop = params.include_stop_str_in_output
        # Pieces of text that left; joined when the text is asked for, since joining at each token costs its
        # length.
        self._pieces: list[str] = []
        self.scores: tuple[float, float] | None = None
        self.output = CompletionOutput(index, "", [])
        if params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0

    def push(
        self,
        token_id: int,
        finish_reason: FinishReason | None,
        stop_token_id: int | None,
        logprobs: TokenLogprobs | None,
    ) -> TextDelta:
        output = self.output
        if output.finish_reason is not None:
            return TextDelta(output.index, "", [])
        output.token_ids.append(token_id)
        delta = TextDelta(output.index, "", [token_id])
        if logprobs is not None and output.logprobs is not None:
            entry = to_logprobs(self._tokenizer, logprobs)
            output.logprobs.append(entry)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs[1][0]
            delta.logprobs = [entry]
        # EOS and stop tokens end the text without being part of it, unless asked for.
        silent = finish_reason == "stop" and not self._with_stop
        text = "" if silent else self._detokenizer.push(token_id)
        if finish_reason is not None:
            text += self._detokenizer.flush()
        found = self._stop_strings.push(text, count=len(output.token_ids) > self._min_tokens)
        if isinstance(found, Match):
            delta.abort = finish_reason is None
            finish_reason, stop_reason = "stop", found.stop
            delta.text = found.text + found.stop if self._with_stop else found.text
            self._end(delta, finish_reason, stop_reason)
        elif finish_reason is not None:
            delta.text = found + self._stop_strings.flush()
            self._end(delta, finish_reason, stop_token_id)
        elif self._repetition is not None and repeats(output.token_ids, self._repetition):
            delta.abort = True
            rest = self._stop_strings.push(self._detokenizer.flush(), count=False)
            assert isinstance(rest, str), "stop strings were not counted"
            delta.text = found + rest + self._stop_strings.flush()
            self._end(delta, "repetition", None)
        else:
            delta.text = found
        if delta.text:
            self._pieces.append(delta.text)
        return delta

    def finish(self, reason: FinishReason) -> TextDelta:
        delta = TextDelta(self.output.index, "", [])
        if self.output.finish_reason is None:
            found = self._stop_strings.push(self._detokenizer.flush(), count=False)
            assert isinstance(found, str), "stop strings were not counted"
            delta.text = found + self._stop_strings.flush()
            self._pieces.append(delta.text)
            self._end(delta, reason, None)
        return delta

    def completion(self) -> CompletionOutput:
        """The output with its text up to date."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        self.output.text = self._pieces[0] if self._pieces else ""
        return self.output

    def _end(self, delta: TextDelta, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.output.finish_reason = delta.finish_reason = reason
        self.output.stop_reason = delta.stop_reason = stop_reason
        if self.scores is not None:
            self.output.cumulative_logprob, self.output.beam_score = self.scores
            delta.cumulative_logprob, delta.beam_score = self.scores


def to_logprobs(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[int, Logprob]:
    """Logprobs of one position by token id:

    the drawn token first, then the most likely ones in falling order.
    """
    token_ids, values, rank = entry
    found = {token_ids[0]: Logprob(values[0], rank, tokenizer.token_text(token_ids[0]))}
    for place in range(1, len(token_ids)):
        if token_ids[place] != token_ids[0]:
            found[token_ids[place]] = Logprob(values[place], place, tokenizer.token_text(token_ids[place]))
    return found


def bad_words_to_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word as it stands at a text's beginning and after a space; equal ones once."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare, " " + bare) if bare else (word,):
            if ids := tokenizer.encode(text, add_bos=False):
                found[tuple(ids)] = None
    return [list(ids) for ids in found]
