"""Fair share between tenants: whose request joins next, computes first, and has to give way.

Each tenant has a counter of what it was served: a prompt's computed tokens once, drawn tokens twice. Who has the least
goes first, and who comes back after a pause is lifted to where the others are, so that nobody saves up (Sheng et al.
2024, Virtual Token Counter). Beyond that paper a tenant that holds less than others may take its share back by their
preemption, since waiting for an end takes long where answers do. Knows nothing of blocks' contents or steps.
"""

from collections.abc import Iterable, Sequence

from octavo.engine.block_manager import BlockManager
from octavo.engine.state import RequestState

DRAWN_TOKEN = 2  # what a drawn token counts, as against one of a prompt
_MOST_IDLE = 1024  # counters kept of tenants that have nothing here


class FairShare:
    """Counters by tenant, and the shares of `max_rows` rows and of the blocks that tenants hold."""

    def __init__(self, max_rows: int, blocks: BlockManager):
        self._max_rows = max_rows
        self._blocks = blocks
        self._served: dict[str, int] = {}
        self._open: dict[str, int] = {}  # requests here, waiting or running
        self._level = 0  # what a tenant that had nothing here begins with, at least

    # ---- counters ---------------------------------------------------------------------------------------------

    def arrives(self, tenant: str) -> None:
        """A request of `tenant` has come."""
        if not self._open.get(tenant):
            if self._open:
                self._level = max(self._level, min(self._served[other] for other in self._open))
            self._served[tenant] = max(self._level, self._served.get(tenant, 0))
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def leaves(self, tenant: str) -> None:
        """A request of `tenant` has ended."""
        self._open[tenant] -= 1
        if self._open[tenant]:
            return
        del self._open[tenant]
        if not self._open:
            self._level = max(self._level, self._served[tenant])
        if len(self._served) > len(self._open) + _MOST_IDLE:
            # Those below the level would be lifted to it: nothing is forgotten.
            self._served = {t: n for t, n in self._served.items() if n > self._level or t in self._open}

    def serve(self, tenant: str, cost: int) -> None:
        """`tenant` was served; nothing if its last request has just ended."""
        if tenant in self._open:
            self._served[tenant] += cost

    def served(self, tenant: str) -> int:
        return self._served[tenant]

    # ---- choices ----------------------------------------------------------------------------------------------

    def next(self, waiting: Sequence[RequestState], running: Iterable[RequestState]) -> RequestState:
        """Who joins next: by priority, then of the tenant served least, then of that holding least, who came first."""
        held = self._shares(running)

        def turn(state: RequestState) -> tuple[object, ...]:
            tenant = state.request.tenant
            return state.request.priority, self._served[tenant], held.get(tenant, 0.0), state.order

        return min(waiting, key=turn)

    def order(self, running: Iterable[RequestState]) -> dict[str, tuple[int, float]]:
        """By tenant a key for whose prompts are computed first: who was served least, then who holds least."""
        return {tenant: (self._served[tenant], share) for tenant, share in self._shares(running).items()}

    def gives_way(self, state: RequestState, running: Iterable[RequestState]) -> list[RequestState]:
        """Running requests one of which should make room for `state`: those of the tenant that holds most, if that is
        more than `state`'s own would hold then. Empty if nobody need."""
        held = self._shares(running)
        most = max(held, key=lambda tenant: held[tenant], default=state.request.tenant)
        rows, tokens = state.num_rows, sum(seq.num_tokens for seq in state.sequences)
        wants = held.get(state.request.tenant, 0.0) + self._share(rows, self._blocks.blocks_for(tokens))
        if most == state.request.tenant or held[most] <= wants:
            return []
        return [s for s in running if s.request.tenant == most and s.request.priority >= state.request.priority]

    def largest(self, running: Sequence[RequestState]) -> list[RequestState]:
        """Those of `running` that belong to the tenant that holds most."""
        held = self._shares(running)
        most = max(held.values())
        return [state for state in running if held[state.request.tenant] == most]

    def _shares(self, running: Iterable[RequestState]) -> dict[str, float]:
        """By tenant the part of rows or of blocks that it holds, whichever is larger."""
        rows: dict[str, int] = {}
        blocks: dict[str, int] = {}
        for state in running:
            tenant = state.request.tenant
            rows[tenant] = rows.get(tenant, 0) + state.num_rows
            blocks[tenant] = blocks.get(tenant, 0) + sum(len(seq.block_table) for seq in state.sequences)
        return {tenant: self._share(rows[tenant], blocks[tenant]) for tenant in rows}

    def _share(self, rows: int, blocks: int) -> float:
        return max(rows / self._max_rows, blocks / self._blocks.num_blocks)
