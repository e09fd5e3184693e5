"""What the engine counts. The server renders these for Prometheus; the log and `octavo bench` read them as they are."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """State now, and totals since the start. Tokens and blocks are counts; times are seconds."""

    running: int = 0  # requests with blocks
    waiting: int = 0  # requests without
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_owned: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # of admitted requests
    output_tokens: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    wasted_tokens: int = 0  # computed again after a preemption

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_lookup_tokens if self.prefix_lookup_tokens else 0.0
