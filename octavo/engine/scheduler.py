"""Who computes how many tokens in the next step.

A sequence has known tokens and computed tokens; each step the second catches up with the first, under a budget of
tokens. Prompts, chunks of prompts, prefix hits, decoding and recomputation after a preemption are that one rule. When
blocks run out, the request that is cheapest to compute again gives up its own. `results` takes in what a step draws,
`registry` has who waits and runs. Knows no words and no tensors.
"""

import itertools
import time
from collections import deque

from octavo.batch import Batch, NextStep, StepResult
from octavo.config import EngineConfig
from octavo.engine.admission import Admission
from octavo.engine.beam_search import BeamSearch
from octavo.engine.fair_share import FairShare
from octavo.engine.forecast import TOKENS_OF_A_STEP, Forecast
from octavo.engine.limits import Limits
from octavo.engine.prefix_store import PrefixStore
from octavo.engine.registry import Registry
from octavo.engine.results import Results
from octavo.engine.rows import changes_logits
from octavo.engine.state import Plan, RequestState, StepOutput
from octavo.log import logger
from octavo.metrics import EngineStats
from octavo.request import Request, Sequence


class Scheduler:
    """Continuous batching over a `BlockManager`.

    Every `schedule` that gives a step is followed by an `update` with its result, in their order. Another step may be
    scheduled before that: tokens that are still being drawn are then placeholders.
    """

    def __init__(self, config: EngineConfig, store: PrefixStore | None = None):
        self.limits = Limits.of(config)
        self._requests = Registry(config)
        self.blocks, self.swap = self._requests.blocks, self._requests.swap
        self._fair = self._requests.fair
        self._config = config
        self._eos = frozenset(config.model.eos_token_ids)
        self._steps: deque[Plan] = deque()
        self._started: list[tuple[str, float, int]] = []
        self._forecast = Forecast(config.max_num_seqs, TOKENS_OF_A_STEP[config.device])
        self._results = Results(self._requests, self._forecast, self._eos)
        self._numbers = itertools.count()
        self._step_numbers = itertools.count()
        self._stats = EngineStats()
        self.admission = Admission(self.blocks, self.swap, store, self._stats)

    # ---- requests come and go ---------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts `request` into the queue; raises `RequestError` if it could never run."""
        self.limits.check(request)
        params = request.params
        assert request.request_id not in self._requests.states, f"request id {request.request_id} is in use"
        number, num_prompt = next(self._numbers), len(request.prompt_token_ids)
        first = Sequence(
            request=request,
            index=0,
            seed=self._seed(request, number),
            token_ids=list(request.prompt_token_ids),
            num_prompt=num_prompt,
            ntk_alpha=self._config.model.rope.ntk_alpha(num_prompt),
        )
        max_tokens = self.limits.max_tokens(request)
        state = RequestState(
            request=request,
            order=(request.priority, request.arrival, number),
            sequences=[first],
            max_len=num_prompt + max_tokens,
            min_len=num_prompt + (max_tokens if params.ends_at_limit else min(params.min_tokens, max_tokens)),
            forked=params.num_sequences == 1,
            search=BeamSearch(params, self._eos, max_tokens) if params.beams else None,
            bound=bool(request.bad_words_token_ids),
            penalized=params.has_penalties,
            plain=self._fair is None and params.logprobs is None and not changes_logits(request),
        )
        self._requests.arrive(state)

    def _seed(self, request: Request, number: int) -> int:
        """The request's own seed, or one from the engine's that no other request has."""
        if request.params.seed is not None:
            return request.params.seed % 2**64
        return (self._config.seed * 0xBF58476D1CE4E5B9 + (number + 1) * 0x94D049BB133111EB) % 2**64

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or only its sample `index`, and frees the blocks; unknown ids are ended already."""
        state = self._requests.states.get(request_id)
        if state is None:
            return
        if index is not None and (not state.forked or state.search is not None):
            return  # the samples, or a search's answers, do not exist yet: none of them can have shown a stop string
        self._requests.stop_decoding(state)
        leader = state.sequences[0]
        filling = leader.num_computed < leader.fills
        for seq in list(state.sequences):
            if index is None or seq.index == index:
                # Stop strings end an answer in this way, too; of a search only the answers that it chooses count.
                if state.search is None and seq.num_known > seq.num_prompt:
                    self._forecast.ended(seq.num_known - seq.num_prompt, False)
                self._requests.end(state, seq, "abort")
        if state.sequences and filling and leader.finish_reason:
            self._preempt(state, None)  # what it was filling for its siblings would stay empty

    def has_work(self) -> bool:
        return bool(self._requests.states or self._steps)

    @property
    def steps_under_way(self) -> int:
        """Steps whose results have not been taken in."""
        return len(self._steps)

    def stats(self) -> EngineStats:
        """State now and totals so far."""
        stats, blocks = self._stats, self.blocks
        stats.running, stats.waiting = len(self._requests.running), len(self._requests.waiting)
        stats.blocks_free, stats.blocks_cached = blocks.num_free, blocks.num_cached
        stats.blocks_owned, stats.block_references = blocks.num_owned, blocks.num_references
        stats.block_size = blocks.block_size
        stats.empty_slots = blocks.empty_slots(seq for state in self._requests.others() for seq in state.sequences)
        stats.empty_slots += self._requests.decoding.empty_slots()
        stats.host_blocks_used = self.swap.num_used
        return stats

    def check(self) -> None:
        """Asserts the invariants of blocks and host blocks. For tests."""
        self._requests.check()

    # ---- a step is made ---------------------------------------------------------------------------------------

    def schedule(self) -> Batch | NextStep | None:
        """The next step, or None if nobody has anything to compute before the steps under way are done."""
        for seq in self._requests.decoding.complete():
            self._requests.stop_decoding(self._requests.of(seq))
        short = self._short_of_blocks()
        if self._steps and (short or self._fair is not None):
            return None  # who gives way is chosen when everybody's tokens are known
        plan = Plan(budget=self._config.max_num_batched_tokens)
        if short:
            self._make_room(plan)
        elif self._fair is not None:
            self._even_out(self._fair, plan)
        if len(self._requests.decoding):
            plan.advance = self._requests.decoding.advance(self._requests.rows.append_blocks)
            plan.budget -= len(self._requests.decoding)
        for state, seq in self._by_urgency():
            self._place(state, seq, plan)
        if not short and plan.budget > 0 and self._requests.waiting:
            plan.rows = self._requests.num_rows
            while plan.budget > 0 and self._requests.waiting and self._admit(state := self._next(), plan):
                for seq in state.sequences:
                    self._place(state, seq, plan)
        if not plan.entries and plan.advance is None:
            assert self._steps or not self._requests.running, "running requests, but nothing to compute"
            return None
        plan.number = next(self._step_numbers)
        self._steps.append(plan)
        step = self._requests.rows.step(plan)
        if plan.entries:
            self._requests.decoding.interrupted()
            self._place_drawn(plan)
        return step

    def whole(self) -> Batch:
        """The Batch that a `NextStep` stands for, which must be the step that was scheduled last."""
        return self._requests.rows.decode_batch(self._steps[-1])

    def _place_drawn(self, plan: Plan) -> None:
        """Appends a placeholder for every token that may be computed before it is seen; who now only decodes joins."""
        drawing: dict[RequestState, int] = {}
        for sample, (seq, _) in enumerate(plan.samples, len(self._requests.decoding)):
            state = self._requests.of(seq)
            if state.runs_ahead:
                seq.token_ids.append(~sample)
                seq.num_pending += 1
                drawing[state] = drawing.get(state, 0) + 1
        joining: list[RequestState] = []
        room = self._config.max_num_batched_tokens - len(self._requests.decoding)
        for state, count in drawing.items():
            everyone = state.plain and count == len(state.sequences) <= room
            if everyone and all(self._only_decodes(state, seq) for seq in state.sequences):
                joining.append(state)
                room -= count
        if joining:
            self._requests.start_decoding(joining, plan.number)

    def _only_decodes(self, state: RequestState, seq: Sequence) -> bool:
        """Whether `seq`, which draws in the last step, has nothing to do from now on but compute what it has drawn."""
        in_a_row = seq.num_pending == 1 or seq.num_pending == len(self._steps)
        return in_a_row and seq.want == 1 and seq.num_tokens < state.max_len and not self.blocks.writes_shared(seq)

    def _by_urgency(self) -> list[tuple[RequestState, Sequence]]:
        """Other running sequences with something to compute, those with a single token first.

        A long prompt must not hold up the streams. Who has all its tokens, the last still being drawn, has nothing to
        compute.
        """
        single: list[tuple[RequestState, Sequence]] = []
        longer: list[tuple[RequestState, Sequence]] = []
        for state in self._requests.others():
            if state.penalized:
                # Of what the host does not know, a device knows the tokens of the step before alone.
                pending = max(seq.num_pending for seq in state.sequences)
                state.waits = pending > 1 or (state.waits and pending > 0)
            for seq in state.sequences:
                want = len(seq.token_ids) - seq.num_computed
                if want and not state.waits and len(seq.token_ids) < state.max_len:
                    (single if want == 1 else longer).append((state, seq))
        if self._fair is not None:
            order = self._fair.order(self._requests.running)
            longer.sort(key=lambda x: order[x[0].request.tenant])
        return single + longer

    def _next(self) -> RequestState:
        """The waiting request whose turn it is."""
        return (
            self._requests.waiting[0]
            if self._fair is None
            else self._fair.next(self._requests.waiting, self._requests.running)
        )

    def _even_out(self, fair: FairShare, plan: Plan) -> None:
        """Lets waiting requests in ahead of everybody's prompts, while tenants that hold more give way to theirs.

        Who has joined in this step does not give way in it, nor are host blocks given out that it has just left.
        """
        joined = False
        while self._requests.waiting and (givers := fair.gives_way(state := self._next(), self._requests.running)):
            while givers and not joined and not self._has_room(state):
                self._preempt(self._cheapest(givers), plan)
                givers = fair.gives_way(state, self._requests.running)
            plan.rows = self._requests.num_rows
            if not (self._has_room(state) and self._admit(state, plan)):
                return
            joined = True

    def _has_room(self, state: RequestState) -> bool:
        """Whether `state` could join beside what the running requests take in this step, even with nothing cached."""
        rows = self._requests.num_rows
        blocks = self._demand() + sum(self.blocks.blocks_for(seq.num_tokens) for seq in state.sequences)
        fits = rows + state.num_rows <= self._config.max_num_seqs and blocks <= self.blocks.num_available
        return fits and self._may_join(state, 0)

    def _place(self, state: RequestState, seq: Sequence, plan: Plan) -> None:
        """Lets `seq` compute what it wants, as far as the budget goes."""
        n = min(seq.want, plan.budget)
        leader = state.sequences[0]
        if n <= 0 or (seq is not leader and leader.num_computed < leader.fills):
            return
        known = len(seq.block_table)
        copies = self.blocks.grow(seq)
        if copies or len(seq.block_table) > known:
            self._requests.rows.write_blocks(seq, min(known, seq.num_computed // self._config.block_size))
        plan.copies += copies
        plan.entries.append((seq, n))
        plan.budget -= n
        if seq.wants_prompt_logprobs:
            # Position p tells the logprob of token p + 1; the prompt's last position belongs to the answer.
            count = min(n, seq.num_prompt - 1 - seq.num_computed)
            plan.prompt_spans.append((seq, seq.num_computed, count))
        seq.num_computed += n
        if self._fair is not None and (new := min(seq.num_computed, seq.num_prompt) - state.counted) > 0:
            self._fair.serve(state.request.tenant, new)
            state.counted += new
        if n > 1:  # others may share a prompt's blocks from this very step on
            self.blocks.commit(seq)
        if seq.want == 0:
            plan.samples.append((seq, 0))
            if not state.forked and state.search is None:
                plan.samples += [(seq, fork) for fork in range(1, state.request.params.n)]

    def _make_room(self, plan: Plan) -> None:
        """Preempts until every running sequence can take its next step."""
        while self._short_of_blocks():
            assert len(self._requests.running) > 1, "a single request does not fit, though Limits.check let it in"
            self._preempt(self._victim(), plan)

    def _short_of_blocks(self) -> bool:
        """Whether there are too few blocks for every running sequence to take its next step."""
        return self._demand() > self.blocks.num_available

    def _demand(self) -> int:
        """Blocks that the running sequences take in this step."""
        growing = [
            seq for state in self._requests.others() for seq in state.sequences if len(seq.token_ids) < state.max_len
        ]
        return self.blocks.demand(growing) + self._requests.decoding.demand()

    def _victim(self) -> RequestState:
        """Of the least important requests the one that is cheapest to compute again, the latest among equals."""
        lowest = max(state.request.priority for state in self._requests.running)
        among = [state for state in self._requests.running if state.request.priority == lowest]
        return self._cheapest(among if self._fair is None else self._fair.largest(among))

    def _cheapest(self, states: list[RequestState]) -> RequestState:
        tokens = self._requests.exclusive_tokens()
        return min(states, key=lambda state: (tokens[state], -state.order[2]))

    def _preempt(self, state: RequestState, plan: Plan | None) -> None:
        """Takes all blocks of a running request back and queues it again at its old place.

        What it has computed goes to host memory if that is cheaper than doing it again, and there is a `plan` whose
        step can make the copies.
        """
        self._requests.stop_decoding(state)
        kept = plan is not None and self.swap.suits(state.sequences, self.blocks)
        if plan is not None and kept:
            copies = self.swap.take_out(state.sequences, self.blocks)
            plan.swap_out += copies
            self._stats.swaps += 1
            self._stats.blocks_swapped_out += len(copies)
        else:
            state.lost_tokens = self.blocks.computed_tokens(state.sequences)
            for seq in state.sequences:
                self.blocks.free(seq)
            if state.search is not None:
                state.search.forget()
        self._requests.withdraw(state)
        self._stats.preemptions += 1
        logger.info(
            "preempted a request (%s): %d KV blocks for %d running requests are too few;"
            " raise --kv-cache-memory or lower --max-num-seqs if this is frequent",
            "kept in host memory" if kept else f"{state.lost_tokens} tokens to compute again",
            self.blocks.num_blocks,
            len(self._requests.running) + 1,
        )

    def _admit(self, state: RequestState, plan: Plan) -> bool:
        """Gives a waiting request the blocks for all that is known of it and lets it run; False if they are short."""
        if plan.rows + state.num_rows > self._config.max_num_seqs:
            return False
        if state.swapped:
            if not self.admission.take_back(state, plan, self._may_join):
                return False
        elif (found := self.admission.take(state, plan, self._may_join)) is None:
            return False
        else:
            self._count_admission(state, found)
        self._requests.run(state)
        plan.rows += state.num_rows
        return True

    def _may_join(self, state: RequestState, owned_hits: int) -> bool:
        return not self._requests.running or self._fits_ahead(state, owned_hits)

    def _fits_ahead(self, state: RequestState, owned_hits: int) -> bool:
        """Whether the running requests will probably not have to give way soon if `state` joins them."""
        return self._forecast.fits(state, self._requests, owned_hits)

    def _count_admission(self, state: RequestState, found: int) -> None:
        leader, stats = state.sequences[0], self._stats
        if state.started:
            stats.wasted_tokens += max(0, state.lost_tokens - found)
            return
        state.started = True
        stats.prompt_tokens += leader.num_prompt
        stats.prefix_lookup_tokens += leader.num_prompt
        stats.prefix_hit_tokens += found
        state.counted = found
        waited = time.monotonic() - state.request.arrival
        self._started.append((state.request.request_id, waited, found))

    # ---- a step comes back ------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> StepOutput:
        """Takes in the oldest step's result: appends tokens, forks, ends sequences, offers full blocks to the cache."""
        plan = self._steps.popleft()
        size = self.blocks.block_size
        for seq, _ in plan.entries:
            if seq.num_computed >= (seq.num_committed + 1) * size:  # most have filled no block in this step
                self.blocks.commit(seq)
        output = self._results.take(plan, result)
        output.started, self._started = self._started, []
        self._stats.count_step(len(result.token_ids), self.blocks.num_owned, self.blocks.num_references)
        return output
