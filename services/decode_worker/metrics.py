"""A decode worker's Prometheus metrics."""

import time
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from precast.metrics import PlainCounter, PlainHistogram

_STEP_BUCKETS: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0)
_WAITS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)


class _ProcessorTime(Collector):
    """What the leader has used, read when it is scraped."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "decode_worker_leader_processor_seconds",
            "Processor time of the leader, without its ranks",
            value=time.process_time(),
        )


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.restarts = Counter(
            "decode_worker_group_restarts", "Times the ranks were restarted", registry=self.registry
        )
        self.failed_draws = Counter(
            "decode_worker_failed_draws",
            "Requests that ended because no token could be drawn, as when logits are NaN",
            ["reason"],
            registry=self.registry,
        )
        self.running = Gauge(
            "decode_worker_running_requests", "Requests with a slot", registry=self.registry
        )
        self.waiting = Gauge(
            "decode_worker_waiting_requests", "Requests in the queue", registry=self.registry
        )
        self.kv_free = Gauge(
            "decode_worker_kv_free_blocks", "Free blocks of the KV cache", registry=self.registry
        )
        self.window_free = Gauge(
            "decode_worker_kv_window_free_blocks",
            "Free blocks of layers that attend to a window; 0 without such",
            registry=self.registry,
        )
        self.unsigned = Gauge(
            "decode_worker_unsigned_graphs_allowed",
            "1 while graphs are loaded that no trusted key has signed",
            registry=self.registry,
        )
        self._steps = PlainCounter(
            "decode_worker_steps", "Steps by the captured size that ran, 0 for eager", "graph_size"
        )
        self._tokens = PlainCounter(
            "decode_worker_tokens",
            "Tokens computed: of prompts (prefill), or drawn before (decode)",
            "phase",
        )
        self.cached = PlainCounter(
            "decode_worker_cached_prompt_tokens",
            "Tokens of prompts that were in the KV cache already, by requests that have ended",
        )
        self.drafted = PlainCounter("decode_worker_draft_tokens", "Tokens of drafts computed")
        self.accepted = PlainCounter(
            "decode_worker_accepted_draft_tokens", "Tokens of drafts that were right"
        )
        self._padding = PlainCounter(
            "decode_worker_padding_tokens", "Tokens computed only to fill a graph"
        )
        self._sizes = PlainHistogram(
            "decode_worker_step_tokens",
            "Tokens of a step; prefill: with tokens of prompts in it",
            _TOKEN_BUCKETS,
            "phase",
        )
        self._seconds = PlainHistogram(
            "decode_worker_step_seconds",
            "Time of a step in rank 0; prefill: with tokens of prompts in it",
            _STEP_BUCKETS,
            "phase",
        )
        self.prompts = PlainCounter(
            "decode_worker_prompt_tokens", "Tokens of prompts, by requests that have ended"
        )
        self.host = PlainCounter(
            "decode_worker_host_seconds",
            "Time that ranks waited for their leader while requests were running",
        )
        self.queue_seconds = PlainHistogram(
            "decode_worker_queue_seconds", "Requests: from their coming to their first step", _WAITS
        )
        self.first_token_seconds = PlainHistogram(
            "decode_worker_time_to_first_token_seconds",
            "Requests: from their coming to their first token",
            _WAITS,
        )
        self.inter_token_seconds = PlainHistogram(
            "decode_worker_inter_token_seconds",
            "Between two steps that gave a request tokens",
            _STEP_BUCKETS,
        )
        self.registry.register(_ProcessorTime())
        latencies = (self.queue_seconds, self.first_token_seconds, self.inter_token_seconds)
        for collector in (self.prompts, self.host, *latencies):
            self.registry.register(collector)
        counters = (self._steps, self._tokens, self.cached, self.drafted, self.accepted)
        for collector in (*counters, self._padding, self._sizes, self._seconds):
            self.registry.register(collector)

    def serve(self, host: str, port: int) -> None:
        start_http_server(port, host, registry=self.registry)

    def steps(
        self, decode_tokens: int, prompt_tokens: int, graph_size: int, steps_us: Sequence[int]
    ) -> None:
        """Steps of so many tokens each, and what they took."""
        tokens, times = decode_tokens + prompt_tokens, len(steps_us)
        if decode_tokens:
            self._tokens.inc(decode_tokens * times, "decode")
        if prompt_tokens:
            self._tokens.inc(prompt_tokens * times, "prefill")
        self._steps.inc(times, str(graph_size))
        if graph_size > tokens:
            self._padding.inc((graph_size - tokens) * times)
        phase = "prefill" if prompt_tokens else "decode"
        self._sizes.of(phase).observe(tokens, times)
        self._seconds.of(phase).observe_all([step_us / 1e6 for step_us in steps_us])
