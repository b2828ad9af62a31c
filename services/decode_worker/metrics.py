"""A decode worker's Prometheus metrics."""

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_STEP_BUCKETS: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0)
_TOKEN_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class _Children:
    """The metrics of one kind of step: looking them up would cost each step."""

    tokens: Counter
    sizes: Histogram
    seconds: Histogram


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
        self.unsigned = Gauge(
            "decode_worker_unsigned_graphs_allowed",
            "1 while graphs are loaded that no trusted key has signed",
            registry=self.registry,
        )
        self._steps = Counter(
            "decode_worker_steps",
            "Steps by the captured size that ran, 0 for eager",
            ["graph_size"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "decode_worker_tokens",
            "Tokens computed: of prompts (prefill), or drawn before (decode)",
            ["phase"],
            registry=self.registry,
        )
        self.cached = Counter(
            "decode_worker_cached_prompt_tokens",
            "Tokens of prompts that were in the KV cache already, by requests that have ended",
            registry=self.registry,
        )
        self.drafted = Counter(
            "decode_worker_draft_tokens", "Tokens of drafts computed", registry=self.registry
        )
        self.accepted = Counter(
            "decode_worker_accepted_draft_tokens",
            "Tokens of drafts that were right",
            registry=self.registry,
        )
        self._padding = Counter(
            "decode_worker_padding_tokens",
            "Tokens computed only to fill a graph",
            registry=self.registry,
        )
        self._sizes = Histogram(
            "decode_worker_step_tokens",
            "Tokens of a step; prefill: with tokens of prompts in it",
            ["phase"],
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "decode_worker_step_seconds",
            "Time of a step in rank 0; prefill: with tokens of prompts in it",
            ["phase"],
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._kinds = {
            phase: _Children(
                tokens=self._tokens.labels(phase),
                sizes=self._sizes.labels(phase),
                seconds=self._seconds.labels(phase),
            )
            for phase in ("decode", "prefill")
        }
        self._graph_sizes: dict[int, Counter] = {}

    def serve(self, host: str, port: int) -> None:
        start_http_server(port, host, registry=self.registry)

    def step(self, decode_tokens: int, prompt_tokens: int, graph_size: int, step_us: int) -> None:
        tokens = decode_tokens + prompt_tokens
        for phase, count in (("decode", decode_tokens), ("prefill", prompt_tokens)):
            if count:
                self._kinds[phase].tokens.inc(count)
        self._of_size(graph_size).inc()
        if graph_size > tokens:
            self._padding.inc(graph_size - tokens)
        kind = self._kinds["prefill" if prompt_tokens else "decode"]
        kind.sizes.observe(tokens)
        kind.seconds.observe(step_us / 1e6)

    def _of_size(self, graph_size: int) -> Counter:
        known = self._graph_sizes.get(graph_size)
        if known is None:
            known = self._graph_sizes[graph_size] = self._steps.labels(str(graph_size))
        return known
