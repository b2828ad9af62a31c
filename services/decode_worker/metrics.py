"""A decode worker's Prometheus metrics."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from precast.metrics import PlainCounter, PlainHistogram

_STEP_BUCKETS: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0)
_TOKEN_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)


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
        counters = (self._steps, self._tokens, self.cached, self.drafted, self.accepted)
        for collector in (*counters, self._padding, self._sizes, self._seconds):
            self.registry.register(collector)

    def serve(self, host: str, port: int) -> None:
        start_http_server(port, host, registry=self.registry)

    def step(self, decode_tokens: int, prompt_tokens: int, graph_size: int, step_us: int) -> None:
        tokens = decode_tokens + prompt_tokens
        if decode_tokens:
            self._tokens.inc(decode_tokens, "decode")
        if prompt_tokens:
            self._tokens.inc(prompt_tokens, "prefill")
        self._steps.inc(1, str(graph_size))
        if graph_size > tokens:
            self._padding.inc(graph_size - tokens)
        phase = "prefill" if prompt_tokens else "decode"
        self._sizes.of(phase).observe(tokens)
        self._seconds.of(phase).observe(step_us / 1e6)
