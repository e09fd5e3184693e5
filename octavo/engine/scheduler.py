"""Who computes how many tokens in the next step.

A sequence has known tokens and computed tokens; each step the second catches up with the first, under a budget of
tokens. Prompts, chunks of prompts, prefix hits, decoding and recomputation after a preemption are that one rule. When
blocks run out, the request that is cheapest to compute again gives up its own. Knows no words and no tensors.
"""

import bisect
import itertools
import time
from collections import deque
from dataclasses import dataclass, field

from octavo.batch import Batch, LogprobColumns, StepResult
from octavo.config import EngineConfig
from octavo.engine.block_manager import BlockManager
from octavo.engine.forecast import Forecast
from octavo.engine.limits import Limits
from octavo.engine.rows import FORK_STRIDE, RowTable
from octavo.log import logger
from octavo.metrics import EngineStats
from octavo.request import FinishReason, Request, Sequence, TokenLogprobs, TokenOutput


@dataclass(slots=True, eq=False)
class RequestState:
    """A request in the scheduler: its unfinished sequences, which wait, run and are preempted together."""

    request: Request
    order: tuple[int, float, int]  # priority, arrival, number: the queue's order
    sequences: list[Sequence]
    max_len: int  # tokens of prompt and answer at which a sequence ends
    forked: bool  # whether its n samples exist; until the prompt is computed there is one sequence
    started: bool = False
    lost_tokens: int = 0  # computed before the last preemption


@dataclass(slots=True)
class Plan:
    """A step while it is made, and until its result is read."""

    budget: int  # tokens that may still be added
    entries: list[tuple[Sequence, int]] = field(default_factory=list)
    # Who draws a token, in the entries' order: (sequence, 0), and (sequence, k) for its k-th fork, still to be made.
    samples: list[tuple[Sequence, int]] = field(default_factory=list)
    # (sequence, prompt position of the first, number of positions) whose logprobs are wanted
    prompt_spans: list[tuple[Sequence, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What one step tells the outside, in plain values: it crosses to the HTTP process as one message."""

    tokens: list[TokenOutput]
    # Requests admitted for the first time: (request id, seconds in the queue, prompt tokens found in the cache).
    started: list[tuple[str, float, int]] = field(default_factory=list)
    # (request id, prompt position of the first entry, one entry a position)
    prompt_logprobs: list[tuple[str, int, list[TokenLogprobs]]] = field(default_factory=list)


class Scheduler:
    """Continuous batching over a `BlockManager`. `schedule` and `update` alternate; one step may be under way."""

    def __init__(self, config: EngineConfig):
        self.limits = Limits.of(config)
        self.blocks = BlockManager(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._config = config
        self._eos = frozenset(config.model.eos_token_ids)
        self._rows = RowTable(
            config.max_num_seqs, config.max_blocks_per_seq, config.block_size, config.model.eos_token_ids
        )
        self._states: dict[str, RequestState] = {}
        self._waiting: list[RequestState] = []
        self._running: list[RequestState] = []
        self._steps: deque[Plan] = deque()
        self._started: list[tuple[str, float, int]] = []
        self._forecast = Forecast()
        self._numbers = itertools.count()
        self._stats = EngineStats()

    # ---- requests come and go ---------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts `request` into the queue; raises `RequestError` if it could never run."""
        self.limits.check(request)
        assert request.request_id not in self._states, f"request id {request.request_id} is in use"
        number, num_prompt = next(self._numbers), len(request.prompt_token_ids)
        first = Sequence(
            request=request,
            index=0,
            seed=self._seed(request, number),
            token_ids=list(request.prompt_token_ids),
            num_prompt=num_prompt,
            ntk_alpha=self._config.model.rope.ntk_alpha(num_prompt),
        )
        state = RequestState(
            request=request,
            order=(request.priority, request.arrival, number),
            sequences=[first],
            max_len=num_prompt + self.limits.max_tokens(request),
            forked=request.params.n == 1,
        )
        self._states[request.request_id] = state
        self._enqueue(state)

    def _seed(self, request: Request, number: int) -> int:
        """The request's own seed, or one from the engine's that no other request has."""
        if request.params.seed is not None:
            return request.params.seed % 2**64
        return (self._config.seed * 0xBF58476D1CE4E5B9 + (number + 1) * 0x94D049BB133111EB) % 2**64

    def _enqueue(self, state: RequestState) -> None:
        bisect.insort(self._waiting, state, key=lambda waiting: waiting.order)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or only its sample `index`, and frees the blocks; unknown ids are ended already."""
        state = self._states.get(request_id)
        if state is None:
            return
        if index is not None and not state.forked:
            return  # the samples do not exist yet; none of them can have shown a stop string
        leader = state.sequences[0]
        filling = leader.num_computed < leader.fills
        for seq in list(state.sequences):
            if index is None or seq.index == index:
                self._end(state, seq, "abort")
        if state.sequences and filling and leader.finish_reason:
            self._preempt(state)  # what it was filling for its siblings would stay empty

    def has_work(self) -> bool:
        return bool(self._states)

    def stats(self) -> EngineStats:
        """State now and totals so far."""
        stats, blocks = self._stats, self.blocks
        stats.running, stats.waiting = len(self._running), len(self._waiting)
        stats.blocks_free, stats.blocks_cached = blocks.num_free, blocks.num_cached
        stats.blocks_owned = blocks.num_owned
        return stats

    def check(self) -> None:
        """Asserts the block manager's invariants. For tests."""
        self.blocks.check([seq for state in self._states.values() for seq in state.sequences])

    # ---- a step is made ---------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None if nobody has anything to compute."""
        plan = Plan(budget=self._config.max_num_batched_tokens)
        calm = self._make_room()
        for state, seq in self._by_urgency():
            self._place(state, seq, plan)
        while calm and plan.budget > 0 and self._waiting and self._admit(self._waiting[0]):
            state = self._waiting.pop(0)
            for seq in state.sequences:
                self._place(state, seq, plan)
        if not plan.entries:
            assert not self._running, "running requests, but nothing to compute"
            return None
        self._steps.append(plan)
        return self._rows.batch(plan.entries, plan.samples, plan.prompt_spans, plan.copies)

    def _by_urgency(self) -> list[tuple[RequestState, Sequence]]:
        """Running sequences, those with a single token first: a long prompt must not hold up the streams."""
        every = [(state, seq) for state in self._running for seq in state.sequences]
        return [x for x in every if x[1].want == 1] + [x for x in every if x[1].want > 1]

    def _place(self, state: RequestState, seq: Sequence, plan: Plan) -> None:
        """Lets `seq` compute what it wants, as far as the budget goes."""
        n = min(seq.want, plan.budget)
        leader = state.sequences[0]
        if n <= 0 or (seq is not leader and leader.num_computed < leader.fills):
            return
        known = len(seq.block_table)
        copies = self.blocks.grow(seq)
        if copies or len(seq.block_table) > known:
            self._rows.write_blocks(seq, min(known, seq.num_computed // self._config.block_size))
        plan.copies += copies
        plan.entries.append((seq, n))
        plan.budget -= n
        if _wants_prompt_logprobs(seq):
            # Position p tells the logprob of token p + 1; the prompt's last position belongs to the answer.
            count = min(n, seq.num_prompt - 1 - seq.num_computed)
            plan.prompt_spans.append((seq, seq.num_computed, count))
        seq.num_computed += n
        if seq.want == 0:
            plan.samples += [(seq, fork) for fork in range(1 if state.forked else state.request.params.n)]

    def _make_room(self) -> bool:
        """Preempts until every running sequence can take its next step; False if anybody had to go."""
        calm = True
        while self._demand() > self.blocks.num_available:
            assert len(self._running) > 1, "a single request does not fit, though Limits.check let it in"
            self._preempt(self._victim())
            calm = False
        return calm

    def _demand(self) -> int:
        return self.blocks.demand(seq for state in self._running for seq in state.sequences)

    def _victim(self) -> RequestState:
        """Of the least important requests the one that is cheapest to compute again, the latest among equals."""
        lowest = max(state.request.priority for state in self._running)
        return min(
            (state for state in self._running if state.request.priority == lowest),
            key=lambda state: (self.blocks.computed_tokens(state.sequences, exclusive=True), -state.order[2]),
        )

    def _preempt(self, state: RequestState) -> None:
        """Takes all blocks of a running request back and queues it again at its old place."""
        state.lost_tokens = self.blocks.computed_tokens(state.sequences)
        for seq in state.sequences:
            self._rows.remove(seq)
            self.blocks.free(seq)
        self._running.remove(state)
        self._enqueue(state)
        self._stats.preemptions += 1
        logger.info(
            "preempted a request with %d computed tokens: %d KV blocks for %d running requests are too few;"
            " raise --kv-cache-memory or lower --max-num-seqs if this is frequent",
            state.lost_tokens,
            self.blocks.num_blocks,
            len(self._running) + 1,
        )

    def _admit(self, state: RequestState) -> bool:
        """Gives a waiting request the blocks for all that is known of it and lets it run; False if they are short."""
        rows = sum(self._num_rows(running) for running in self._running)
        if rows + self._num_rows(state) > self._config.max_num_seqs:
            return False
        leader, *siblings = state.sequences
        # A sequence that must show its prompt's logprobs has to compute all of it.
        hits = [] if _wants_prompt_logprobs(leader) else self.blocks.match_prefix(leader)
        if self._running and not self._fits_ahead(state, self.blocks.count_owned(hits)):
            return False
        taken = self.blocks.take(leader, hits, leader.num_tokens)
        # After a preemption the samples share their prompt's full blocks again; the first of them fills these.
        shared = leader.num_prompt // self._config.block_size if siblings else 0
        leader.fills = shared * self._config.block_size
        for seq in siblings:
            hits = self.blocks.match_prefix(seq)
            taken = taken and self.blocks.take(
                seq, hits if len(hits) > shared else leader.block_table[:shared], seq.num_tokens
            )
        if not taken:
            for seq in state.sequences:
                self.blocks.free(seq)
            return False
        for seq in state.sequences:
            self._rows.add(seq)
        self._running.append(state)
        self._count_admission(state, shared)
        return True

    def _fits_ahead(self, state: RequestState, owned_hits: int) -> bool:
        """Whether the running requests will probably not have to give way soon if `state` joins them.

        `owned_hits` blocks of its prompt are held by running requests already.
        """
        block = self._config.block_size
        running = [(each, seq) for each in self._running for seq in each.sequences]
        held = [(len(seq.block_table) - seq.num_borrowed) * block for _, seq in running]
        shared = self.blocks.num_owned * block - sum(held)  # by sequences whose first owner has ended
        new = [self.blocks.blocks_for(seq.num_tokens) * block for seq in state.sequences]
        new[0] += shared - owned_hits * block
        may_grow = [each.max_len - seq.num_tokens for each, seq in running]
        may_grow += [state.max_len - seq.num_tokens for seq in state.sequences]
        return self._forecast.peak(held + new, may_grow) <= self._config.num_blocks * block

    def _num_rows(self, state: RequestState) -> int:
        return len(state.sequences) if state.forked else state.request.params.n

    def _count_admission(self, state: RequestState, shared: int) -> None:
        leader, stats = state.sequences[0], self._stats
        found = sum(seq.num_computed for seq in state.sequences)
        found -= (len(state.sequences) - 1) * shared * self._config.block_size
        if state.started:
            stats.wasted_tokens += max(0, state.lost_tokens - found)
            return
        state.started = True
        stats.prompt_tokens += leader.num_prompt
        stats.prefix_lookup_tokens += leader.num_prompt
        stats.prefix_hit_tokens += found
        waited = time.monotonic() - state.request.arrival
        self._started.append((state.request.request_id, waited, found))

    # ---- a step comes back ------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> StepOutput:
        """Takes in the oldest step's result: appends tokens, forks, ends sequences, offers full blocks to the cache."""
        plan = self._steps.popleft()
        for seq, _ in plan.entries:
            self.blocks.commit(seq)
        output = StepOutput(tokens=[], started=self._started)
        self._started = []
        self._collect_prompt_logprobs(plan, result, output)
        tokens = result.token_ids.tolist()
        owners = [self._fork(seq, index) if index else seq for seq, index in plan.samples]
        for i, seq in enumerate(owners):
            state = self._states[seq.request.request_id]
            seq.token_ids.append(tokens[i])
            reason, stop = self._ending(state, seq, tokens[i])
            logprobs = None
            if seq.request.params.logprobs is not None and result.logprobs is not None:
                logprobs = _logprobs_at(result.logprobs, i, seq.request.params.logprobs)
            output.tokens.append((seq.request.request_id, seq.index, tokens[i], reason, stop, logprobs))
            if reason is not None:
                self._forecast.ended(seq.num_output)
                self._end(state, seq, reason)
        self._stats.steps += 1
        self._stats.output_tokens += len(tokens)
        return output

    def _fork(self, seq: Sequence, index: int) -> Sequence:
        """Sample `index` of a request whose prompt `seq` has just computed; it shares all blocks."""
        fork = Sequence(
            request=seq.request,
            index=index,
            seed=(seq.seed + index * FORK_STRIDE) % 2**64,
            token_ids=list(seq.token_ids),
            num_prompt=seq.num_prompt,
            ntk_alpha=seq.ntk_alpha,
        )
        self.blocks.fork(seq, fork)
        self._rows.add(fork)
        state = self._states[seq.request.request_id]
        state.sequences.append(fork)
        state.forked = True
        return fork

    def _ending(self, state: RequestState, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token` ends `seq`: the reason, and the stop token id if that was it."""
        params = seq.request.params
        if seq.num_output >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if token in self._eos and not params.ignore_eos:
                return "stop", None
        return ("length", None) if seq.num_tokens >= state.max_len else (None, None)

    def _end(self, state: RequestState, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        if seq.row >= 0:
            self._rows.remove(seq)
        self.blocks.free(seq)
        state.sequences.remove(seq)
        if not state.sequences:
            del self._states[state.request.request_id]
            (self._running if state in self._running else self._waiting).remove(state)

    def _collect_prompt_logprobs(self, plan: Plan, result: StepResult, output: StepOutput) -> None:
        first = 0
        for seq, start, count in plan.prompt_spans:
            assert result.prompt_logprobs is not None, "the step was asked for prompt logprobs"
            wanted = seq.request.params.prompt_logprobs or 0
            entries = [_logprobs_at(result.prompt_logprobs, first + i, wanted) for i in range(count)]
            output.prompt_logprobs.append((seq.request.request_id, start, entries))
            first += count


def _wants_prompt_logprobs(seq: Sequence) -> bool:
    """Whether prompt positions of `seq` are still to be computed whose logprobs were asked for."""
    asked = seq.request.params.prompt_logprobs is not None
    return asked and seq.num_output == 0 and seq.num_computed < seq.num_prompt - 1


def _logprobs_at(columns: LogprobColumns, i: int, num_logprobs: int) -> TokenLogprobs:
    """Entry `i` as plain lists: the token itself, then the `num_logprobs` most likely ones."""
    end = 1 + num_logprobs
    return columns.token_ids[i, :end].tolist(), columns.logprobs[i, :end].tolist(), int(columns.rank[i])
