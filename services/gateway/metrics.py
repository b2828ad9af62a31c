"""What ``/metrics`` shows."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from precast.metrics import PlainHistogram

_LATENCY_BUCKETS_S: Final = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_STEP_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """One app's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests_total",
            "HTTP requests by route and status; 499: the client went away",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.request_seconds = self._histogram(
            "gateway_request_seconds", "Whole HTTP requests for generations", _LATENCY_BUCKETS_S
        )
        self.first_token_seconds = PlainHistogram(
            "gateway_time_to_first_token_seconds",
            "Request to first token, of streams",
            _LATENCY_BUCKETS_S,
            "model",
        )
        self.inter_token_seconds = PlainHistogram(
            "gateway_inter_token_seconds",
            "Between two tokens of a stream's choice",
            _STEP_BUCKETS_S,
            "model",
        )
        for tokens in (self.first_token_seconds, self.inter_token_seconds):
            self.registry.register(tokens)
        self.prompt_tokens = self._counter("gateway_prompt_tokens_total", "Tokens of prompts")
        self.completion_tokens = self._counter(
            "gateway_completion_tokens_total", "Tokens generated for finished choices"
        )
        self.retries = self._counter(
            "gateway_retries_total", "Requests that were sent to another worker"
        )
        self.resumptions = self._counter(
            "gateway_resumptions_total", "Those of them that went on behind tokens they had"
        )
        self.stream_errors = self._counter(
            "gateway_stream_errors_total", "Event streams that ended with an error"
        )
        self.ignored_fields = Counter(
            "gateway_ignored_fields_total",
            "Fields of requests that were ignored because they are not known",
            ["endpoint"],
            registry=self.registry,
        )
        self.disconnects = self._counter(
            "gateway_client_disconnects_total", "Clients that left before their answer was complete"
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model"], buckets=buckets, registry=self.registry)
