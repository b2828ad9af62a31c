"""Traces in OpenTelemetry's terms, sent over OTLP where an address is set.

Where none is there is no tracer: nothing of OpenTelemetry is imported, and nothing is noted. Spans
go out in batches, from a thread of their own. What its queue has no room for, or the collector
doesn't take, is dropped: requests never wait for it.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from precast import __version__
from precast.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

_EXPORT_S: Final = 5
"""Longest that one export may take."""
_LAST_S: Final = 2.0
"""Longest that a process waits for its last spans to go out."""
_CLOCK_SET_NS: Final = 1_000_000
"""What the clocks differ by more than before once one was set; less is how they are read."""
Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of a span that is over (monotonic, s)."""

    began_s: float
    ended_s: float


class Span:
    """One that has begun."""

    def __init__(self, span: "trace.Span", tracer: "Tracer") -> None:
        self._span = span
        self._tracer = tracer

    @property
    def traceparent(self) -> str:
        """As W3C writes the context of what happens within it."""
        return self._tracer.traceparent(self._span)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def record(self, name: str, times: Times, attributes: Attributes | None = None) -> None:
        """What happened within it, and is over."""
        self._tracer.record(name, times, parent=self.traceparent, attributes=attributes)

    def end(self, error: str = "") -> None:
        _end(self._span, error, None)


class Tracer:
    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("precast", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._since = _since_1970()

    def begin(self, name: str, *, parent: str, attributes: Attributes) -> Span:
        """Of a request that came in. ``parent``: the caller's traceparent; what is none counts as
        nothing."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract({"traceparent": parent})
        span = self._tracer.start_span(
            name, context=context, kind=SpanKind.SERVER, attributes=attributes
        )
        return Span(span, self)

    def record(
        self,
        name: str,
        times: Times,
        *,
        parent: str,
        attributes: Attributes | None = None,
        error: str = "",
    ) -> str:
        """A span that is over; gives the traceparent for what happened within it."""
        began, ended = (round(at * 1e9) + self._zero() for at in (times.began_s, times.ended_s))
        context = self._propagator.extract({"traceparent": parent})
        span = self._tracer.start_span(
            name, context=context, attributes=attributes, start_time=began
        )
        _end(span, error, ended)
        return self.traceparent(span)

    def _zero(self) -> int:
        """When the monotonic clock was 0; the same for spans that belong together, as long as
        nobody sets the clock."""
        now = _since_1970()
        if abs(now - self._since) > _CLOCK_SET_NS:
            self._since = now
        return self._since

    def traceparent(self, span: "trace.Span") -> str:
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=set_span_in_context(span))
        return carrier.get("traceparent", "")

    async def close(self) -> None:
        """Sends what waits, if that goes quickly."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await asyncio.to_thread(self._provider.force_flush, int(_LAST_S * 1e3))


def open_tracer(endpoint: str | None, *, service: str, instance: str) -> Tracer | None:
    """None where no endpoint is given. Raises ``ConfigError`` where OpenTelemetry is missing."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"otlp_endpoint: {error}; pip install precast[telemetry]") from None
    resource = Resource.create(
        {
            "service.name": service,
            "service.version": __version__,
            "service.instance.id": instance,
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    return Tracer(provider)


def _since_1970() -> int:
    """Of the monotonic clock's beginning, ns."""
    return time.time_ns() - time.monotonic_ns()


def _end(span: "trace.Span", error: str, at_ns: int | None) -> None:
    from opentelemetry.trace import Status, StatusCode

    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(at_ns)
