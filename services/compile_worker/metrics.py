"""Prometheus metrics of a compile worker."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from precast.errors import ConfigError

_BUCKETS: Final = (1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600)


class Metrics:
    """Each worker has a registry of its own, so that two can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.captures = Counter(
            "compile_worker_captures",
            "Captures that ended, by outcome: published, failed, cancelled, lost.",
            ["outcome"],
            registry=self.registry,
        )
        self.capture_seconds = Histogram(
            "compile_worker_capture_seconds",
            "Wall time of captures that were published.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.active_jobs = Gauge(
            "compile_worker_active_jobs",
            "Jobs of the whole fleet that are queued or being captured.",
            registry=self.registry,
        )
        self.capturing = Gauge(
            "compile_worker_capturing_jobs",
            "Captures that run in this worker now.",
            registry=self.registry,
        )
        self.fetches = Counter(
            "compile_worker_fetches",
            "Artifacts handed out, by result: sent, rejected.",
            ["result"],
            registry=self.registry,
        )

        self.store_bytes = Gauge(
            "compile_worker_store_bytes",
            "Artifacts in the store, as of the last look.",
            registry=self.registry,
        )
        self.removed = Counter(
            "compile_worker_removed_artifacts",
            "Artifacts removed to keep the store within its bound.",
            registry=self.registry,
        )
        self.scrubbed = Counter(
            "compile_worker_scrubbed_artifacts",
            "Artifacts read back, by result: good, damaged. Damaged ones are put aside.",
            ["result"],
            registry=self.registry,
        )

    def count(self, name: str) -> int:
        """Present value of a metric without labels."""
        return int(self.registry.get_sample_value(name) or 0)

    def serve(self, host: str, port: int) -> None:
        """Answer scrapes on one interface. Raises ``ConfigError`` if the port is taken."""
        try:
            start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"metrics_port {port}: {error.strerror}") from None
