"""What Prometheus reads: the engine's own counts, taken when asked, and what only the front can time.

Histograms are fed once a request, never once a token.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.metrics import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bounds in seconds.
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.25, 2.5, 5, 10, 20, 40, 80)
_PER_TOKEN = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_QUEUED = (0.001, 0.005, 0.02, 0.1, 0.3, 1, 2.5, 5, 10, 20, 40, 80)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(stats))
        self.first_token = self._histogram("time_to_first_token", "Arrival to first token", _FIRST_TOKEN)
        self.per_token = self._histogram("time_per_output_token", "Mean time between tokens", _PER_TOKEN)
        self.queued = self._histogram("request_queue_time", "Arrival to first scheduled step", _QUEUED)
        self.whole = self._histogram("e2e_request_latency", "Arrival to last token", _WHOLE)
        self._finished = Counter(
            "octavo_requests_finished", "Finished sequences by reason", ["finish_reason"], registry=self._registry
        )
        self._http = Counter(
            "octavo_http_requests", "HTTP requests", ["method", "path", "status"], registry=self._registry
        )

    def _histogram(self, name: str, doc: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"octavo_{name}_seconds", f"{doc}, in seconds.", buckets=bounds, registry=self._registry)

    def finished(self, reason: str) -> None:
        self._finished.labels(reason).inc()

    def http(self, method: str, path: str, status: int) -> None:
        """`path` must be one of few, and never what a client made up."""
        self._http.labels(method, path, status).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineMetrics(Collector):
    """`EngineStats` as metrics, at the moment of the scrape."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("octavo_requests_running", "Requests with blocks", value=stats.running)
        yield GaugeMetricFamily("octavo_requests_waiting", "Requests without blocks", value=stats.waiting)
        blocks = GaugeMetricFamily("octavo_kv_blocks", "Blocks of the KV cache by state", labels=["state"])
        blocks.add_metric(["free"], stats.blocks_free)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["owned"], stats.blocks_owned)
        yield blocks
        tokens = GaugeMetricFamily("octavo_kv_tokens", "Token slots of the KV cache by state", labels=["state"])
        tokens.add_metric(["stored"], stats.stored_tokens)
        tokens.add_metric(["empty"], stats.empty_slots)
        tokens.add_metric(["cached"], stats.blocks_cached * stats.block_size)
        tokens.add_metric(["free"], stats.blocks_free * stats.block_size)
        yield tokens
        doc = "Owned slots without a token, in percent of the owned slots"
        yield GaugeMetricFamily("octavo_kv_waste_percent", doc, value=100 * stats.waste)
        doc = "Entries of all block tables: the blocks that would be owned if nothing were shared"
        yield GaugeMetricFamily("octavo_kv_block_references", doc, value=stats.block_references)
        doc = "Host blocks that hold the KV of preempted requests"
        yield GaugeMetricFamily("octavo_kv_host_blocks_used", doc, value=stats.host_blocks_used)
        for name, doc, value in (
            ("steps", "Forward passes", stats.steps),
            ("step_seconds", "Time in forward passes", stats.step_seconds),
            ("prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
            ("generation_tokens", "Tokens drawn", stats.output_tokens),
            ("prefix_lookup_tokens", "Prompt tokens looked up in the prefix cache", stats.prefix_lookup_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
            ("preemptions", "Requests that had to give up their blocks", stats.preemptions),
            ("wasted_tokens", "Tokens computed again after a preemption", stats.wasted_tokens),
            ("swaps", "Preemptions that kept the KV in host memory", stats.swaps),
            ("blocks_swapped_out", "Blocks copied to host memory", stats.blocks_swapped_out),
            ("blocks_swapped_in", "Blocks copied back from host memory", stats.blocks_swapped_in),
            ("blocks_loaded", "Blocks read from the prefix cache on disk", stats.blocks_loaded),
            ("blocks_saved", "Blocks written to the prefix cache on disk", stats.blocks_saved),
        ):
            yield CounterMetricFamily(f"octavo_{name}", doc, value=value)
