"""What a step has drawn: tokens are appended, samples fork, beams go on, sequences end.

Beams are sequences like others, but `beam_search` says what they become.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from octavo.batch import NO_TOKEN, StepResult
from octavo.engine.beam_search import BeamSearch
from octavo.engine.fair_share import DRAWN_TOKEN
from octavo.engine.forecast import Forecast
from octavo.engine.registry import Registry
from octavo.engine.rows import FORK_STRIDE
from octavo.engine.state import Plan, RequestState, StepOutput
from octavo.errors import InternalError, OctavoError, RequestError, internal_error
from octavo.log import logger
from octavo.request import FinishReason, Sequence


class Results:
    """Takes in steps' results, in their order. The `forecast` is told how long answers are."""

    def __init__(self, requests: Registry, forecast: Forecast, eos_token_ids: frozenset[int]):
        self._requests = requests
        self._forecast = forecast
        self._eos = eos_token_ids

    def take(self, plan: Plan, result: StepResult) -> StepOutput:
        """What the step brings to those who asked."""
        drawn, complete, others = self._requests.decoding.take(
            plan.number, plan.advance.members if plan.advance else None, plan.sample_rows, result.token_ids
        )
        output = StepOutput(tokens=drawn)
        self._end_decoding(complete, output)
        output.add_prompt_logprobs(plan, result.prompt_logprobs)
        if others:
            self._take_others(plan, result, others, output)
        return output

    def _end_decoding(self, complete: list[tuple[int, Sequence]], output: StepOutput) -> None:
        """Ends sequences that only decoded, whose last tokens are those at these places of `output`."""
        failed = {self._requests.of(seq): output.tokens[i][2] for i, seq in complete if output.tokens[i][2] < 0}
        for state, token in failed.items():
            self._requests.stop_decoding(state)
            self._fail(state, _no_token(token), output)
        complete = [(i, seq) for i, seq in complete if seq.finish_reason is None]
        if complete:
            self._requests.decoding.leave([seq for _, seq in complete])
        for i, seq in complete:
            state = self._requests.of(seq)
            name, index, token, *_ = output.tokens[i]
            reason, stop = self._ending(state, seq, token)
            assert reason is not None, "a sequence is complete, but has no reason to end"
            output.tokens[i] = (name, index, token, reason, stop, None)
            self._end(state, seq, reason)
        if failed:
            output.tokens = [token for token in output.tokens if token[2] >= 0]

    def _take_others(self, plan: Plan, result: StepResult, samples: list[int], output: StepOutput) -> None:
        """Takes in what these samples of a step drew, sequence by sequence."""
        tokens = result.token_ids.tolist()
        first = plan.advance.members.sequences if plan.advance else []
        drawing = [(i, *(plan.samples[i - len(first)] if i >= len(first) else (first[i], 0))) for i in samples]
        owners = [
            (i, self._fork(seq, index) if index and seq.finish_reason is None else seq) for i, seq, index in drawing
        ]
        if self._requests.fair is not None:
            for _, seq in owners:
                self._requests.fair.serve(seq.request.tenant, DRAWN_TOKEN)
        searching: dict[RequestState, None] = {}
        for i, seq in owners:
            if seq.finish_reason is not None:
                continue  # it ended while this step was under way
            state = self._requests.of(seq)
            if tokens[i] < 0:
                self._fail(state, _no_token(tokens[i]), output)
            elif state.search is None:
                with self._own_affair(state, output):
                    self._append(seq, tokens[i], result, i, output)
            else:
                assert result.logprobs is not None, "beams ask for their likeliest tokens"
                state.search.put(seq.index, result.logprobs.entry(i, state.search.num_candidates))
                searching[state] = None
        for state in searching:
            if state.sequences:
                with self._own_affair(state, output):
                    self._advance(state, output)

    @contextmanager
    def _own_affair(self, state: RequestState, output: StepOutput) -> Iterator[None]:
        """An exception inside ends the request of `state`, and no other."""
        try:
            yield
        except Exception as error:
            logger.exception("an unexpected error ended request %s", state.request.request_id)
            self._fail(state, internal_error(error), output)

    def _append(self, seq: Sequence, token: int, result: StepResult, sample: int, output: StepOutput) -> None:
        """Appends what sample number `sample` of a step drew, and ends the sequence if that completes it."""
        state = self._requests.of(seq)
        if seq.num_pending:
            seq.token_ids[-seq.num_pending] = token
            seq.num_pending -= 1
        else:
            seq.token_ids.append(token)
        reason, stop = self._ending(state, seq, token)
        logprobs, wanted = None, seq.request.params.logprobs
        if wanted is not None and result.logprobs is not None:
            logprobs = result.logprobs.entry(sample, wanted)
        output.tokens.append((seq.request.request_id, seq.index, token, reason, stop, logprobs))
        if reason is not None:
            self._end(state, seq, reason)

    def _fork(self, seq: Sequence, index: int) -> Sequence:
        """Sample `index` of a request whose prompt `seq` has just computed; it shares all blocks."""
        fork = self._split(seq, index, (seq.seed + index * FORK_STRIDE) % 2**64)
        state = self._requests.of(seq)
        state.sequences.append(fork)
        state.forked = True
        return fork

    def _split(self, seq: Sequence, index: int, seed: int) -> Sequence:
        """A second sequence with the tokens and the blocks of `seq`."""
        fork = replace(seq, index=index, seed=seed, token_ids=list(seq.token_ids))
        self._requests.split(seq, fork)
        return fork

    def _advance(self, state: RequestState, output: StepOutput) -> None:
        """Lets a request's beams go on as its search says, if all of them have been computed; or ends it."""
        search = state.search
        assert search is not None
        if not search.ready:
            return
        survivors = search.advance()
        if search.done:
            self._answer(state, search, output)
            return
        parents = state.sequences
        going = {survivor.parent for survivor in survivors}
        for index, seq in enumerate(parents):
            if index not in going:
                self._requests.drop(seq)
        # The first child of a beam is that beam, any other a fork of it, made before the beam grows.
        beams: list[Sequence] = []
        for index, survivor in enumerate(survivors):
            parent = parents[survivor.parent]
            beams.append(self._split(parent, index, parent.seed) if parent in beams else parent)
        for index, (seq, survivor) in enumerate(zip(beams, survivors, strict=True)):
            seq.index = index
            seq.token_ids.append(survivor.token)
        state.sequences = beams
        state.forked = True

    def _answer(self, state: RequestState, search: BeamSearch, output: StepOutput) -> None:
        """Ends a search with its answers."""
        output.add_answers(state.request.request_id, search.answers())
        for answer in search.answers():
            self._forecast.ended(answer.length, len(state.request.prompt_token_ids) + answer.length >= state.max_len)
        for seq in list(state.sequences):
            self._requests.end(state, seq, "stop")

    def _end(self, state: RequestState, seq: Sequence, reason: FinishReason) -> None:
        self._forecast.ended(seq.num_known - seq.num_prompt, seq.num_known >= state.max_len)
        self._requests.end(state, seq, reason)

    def _fail(self, state: RequestState, error: OctavoError, output: StepOutput) -> None:
        """Ends a whole request, which has left `decoding`, with an error of its own; others go on."""
        for seq in list(state.sequences):
            self._requests.end(state, seq, "error")
        output.failed.append((state.request.request_id, error))

    def _ending(self, state: RequestState, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token` ends `seq`: the reason, and the stop token id if that was it."""
        params = seq.request.params
        if seq.num_known - seq.num_prompt >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if token in self._eos and not params.ignore_eos:
                return "stop", None
        return ("length", None) if seq.num_known >= state.max_len else (None, None)


def _no_token(token: int) -> OctavoError:
    """Why a sampler gave `token`, which is none."""
    if token == NO_TOKEN:
        return RequestError(
            "allowed_token_ids, logit_bias, bad_words and min_tokens together leave no token that may come next;"
            " allow more"
        )
    return InternalError("the model's logits are not finite (NaN or infinity), so that no token can be sampled")
