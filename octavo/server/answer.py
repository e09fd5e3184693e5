"""One HTTP request's answer: the engine's streams of its prompts, read as text.

Whole answers are streamed ones that were collected. Deltas that gathered while the client was slow are merged, one a
sequence. Whatever ends the reading early must `close` the answer, so that its blocks come back. Knows no JSON.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from octavo.engine.process import EngineClient
from octavo.engine.stream import Arrived, Stream, Wake
from octavo.errors import RequestError
from octavo.request import Request, RequestOutput
from octavo.server.failure import ClientGoneError
from octavo.server.metrics import Metrics
from octavo.server.model import RequestText, ServedModel, TextDelta

# Of prompts, which are put into messages without a break: some milliseconds.
_TOKENS_AT_ONCE = 100_000


@dataclass(slots=True)
class Part:
    """One prompt of the request; its n sequences are the choices from `first_choice` on."""

    request: Request
    text: RequestText
    stream: Stream
    first_choice: int
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, over all prompts and choices."""

    prompt: int
    cached: int
    completion: int


class Answer:
    """Requests that were submitted together; reads their deltas."""

    def __init__(self, engine: EngineClient, model: ServedModel, metrics: Metrics):
        self.model = model
        self.parts: list[Part] = []
        self.prompt_only = False  # whether the one token that each sequence draws is for nobody
        self._engine = engine
        self._metrics = metrics
        self._wake = Wake()

    async def submit(self, requests: Sequence[Request], prompts: Sequence[str | None], whole: bool) -> None:
        """Submits `requests`, whose `prompts` are their texts, where these are known.

        `whole`: nobody reads deltas as they come. Raises what `EngineClient.submit` raises, and then leaves none
        behind. Others have their turn while many are submitted.
        """
        engine, model = self._engine, self.model
        if len(requests) > engine.max_queued_requests:
            raise RequestError(
                f"prompt holds {len(requests)} prompts; the queue takes {engine.max_queued_requests}"
                " (--max-queued-requests)",
                "prompt",
            )
        try:
            submitted = 0  # tokens since the last turn of others
            for request, prompt in zip(requests, prompts, strict=True):
                # A stop string must be seen at once, to end the sequence in the engine.
                stream = engine.submit(request, whole=whole and not request.params.stop, wake=self._wake)
                text = model.text_of(request, prompt)
                self.parts.append(Part(request, text, stream, len(self.parts) * request.params.n))
                submitted += len(request.prompt_token_ids)
                if submitted > _TOKENS_AT_ONCE:
                    submitted = 0
                    await asyncio.sleep(0)
        except BaseException:
            self.close()
            raise

    async def deltas(self) -> AsyncIterator[list[TextDelta]]:
        """Pieces of the answer, at most one delta for each choice; `index` is the choice's.

        Raises `EngineDeadError`, or `ClientGoneError` after `client_gone`.
        """
        if len(self.parts) == 1:
            async for arrived in self.parts[0].stream:
                if deltas := self._take(self.parts[0], arrived):
                    yield deltas
            self._measure(self.parts[0])
            return
        async for part, piece in self._merged():
            if piece is None:
                self._measure(part)
            elif deltas := self._take(part, piece):
                yield deltas

    def results(self) -> list[RequestOutput]:
        """What has come, one entry for each prompt."""
        return [part.text.result() for part in self.parts]

    def usage(self) -> Usage:
        return Usage(
            prompt=sum(len(part.request.prompt_token_ids) for part in self.parts),
            cached=sum(part.text.num_cached_tokens for part in self.parts),
            completion=0
            if self.prompt_only
            else sum(len(output.token_ids) for part in self.parts for output in part.text.outputs()),
        )

    def finish_reasons(self) -> list[str | None]:
        """How each choice ended; None where it did not."""
        return [output.finish_reason for part in self.parts for output in part.text.outputs()]

    def queue_seconds(self) -> float | None:
        """The longest time from a prompt's arrival to its first step; None if none had one."""
        return max((part.queue_seconds for part in self.parts if part.queue_seconds is not None), default=None)

    def first_token_seconds(self) -> float | None:
        """From the arrival to the first token of any choice; None without one."""
        times = [part.stream.first_token - part.request.arrival for part in self.parts if part.stream.first_token]
        return min(times, default=None)

    def num_logprobs(self) -> int:
        """Log probabilities in the whole answer, about."""
        count = 0
        for part in self.parts:
            params, outputs = part.request.params, part.text.outputs()
            if params.prompt_logprobs is not None:
                count += len(part.request.prompt_token_ids) * params.n * (params.prompt_logprobs + 1)
            if params.logprobs is not None:
                count += sum(len(output.token_ids) for output in outputs) * (params.logprobs + 1)
        return count

    def client_gone(self) -> None:
        """Ends everything now; whoever reads `deltas` gets a `ClientGoneError`."""
        self.close()
        for part in self.parts:
            part.stream.fail(ClientGoneError())

    def close(self) -> None:
        """Aborts in the engine what has not ended."""
        for part in self.parts:
            if part.stream.open:
                self._engine.abort(part.request.request_id)

    async def _merged(self) -> AsyncIterator[tuple[Part, Arrived | None]]:
        """The parts' pieces as they come, each with its part; None ends a part."""
        part_of = {part.stream: part for part in self.parts}
        while part_of:
            for stream in await self._wake.wait():
                if (part := part_of.get(stream)) is None:
                    continue
                while (arrived := stream.collect()) is not None:
                    yield part, arrived
                if not stream.open:
                    del part_of[stream]
                    yield part, None

    def _take(self, part: Part, arrived: Arrived) -> list[TextDelta]:
        if arrived.queue_seconds is not None:
            self._metrics.queued.observe(arrived.queue_seconds)
            part.queue_seconds = arrived.queue_seconds
            part.text.num_cached_tokens = arrived.cached_tokens
        for start, entries in arrived.prompt_logprobs:
            part.text.put_prompt_logprobs(start, entries)
        for scored in arrived.beam_scores:
            part.text.put_beam_score(scored)
        merged: dict[int, TextDelta] = {}
        for token in arrived.tokens:
            delta = part.text.push(token)
            if delta.abort:
                self._engine.abort(part.request.request_id, delta.index)
            if delta.finish_reason is not None:
                self._metrics.finished(delta.finish_reason)
            delta.index += part.first_choice
            if (first := merged.get(delta.index)) is None:
                merged[delta.index] = delta
            else:
                _join(first, delta)
        return list(merged.values())

    def _measure(self, part: Part) -> None:
        now, first = time.monotonic(), part.stream.first_token
        self._metrics.whole.observe(now - part.request.arrival)
        if first is None:
            return
        self._metrics.first_token.observe(first - part.request.arrival)
        longest = max(len(output.token_ids) for output in part.text.outputs())
        if longest > 1:
            self._metrics.per_token.observe((now - first) / (longest - 1))


def _join(first: TextDelta, then: TextDelta) -> None:
    """Appends `then` to `first`."""
    first.text += then.text
    first.token_ids += then.token_ids
    if then.logprobs:
        first.logprobs = (first.logprobs or []) + then.logprobs
    first.finish_reason = first.finish_reason or then.finish_reason
    first.stop_reason = then.stop_reason if first.stop_reason is None else first.stop_reason
    if then.beam_score is not None:
        first.cumulative_logprob, first.beam_score = then.cumulative_logprob, then.beam_score
