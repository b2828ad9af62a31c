"""Traces from HTTP to the engine's steps, as a collector gets them over OTLP."""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.decode_worker import decode_worker
from tests.support.gateway_stack import Gateway, Stack, eventually
from tests.support.ports import free_port

MODEL = "tiny"
PROMPT = list(range(60))
CLOCKS_NS = 5_000_000
"""What two processes' clocks may differ by."""


class Collector(TraceServiceServicer):
    """Keeps what it is sent, by trace."""

    def __init__(self) -> None:
        self.spans: dict[bytes, list[tuple[str, Span]]] = {}

    def Export(self, request: Any, _: Any) -> otlp.ExportTraceServiceResponse:
        for group in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    found = self.spans.setdefault(span.trace_id, [])
                    found.append((attributes["service.name"], span))
        return otlp.ExportTraceServiceResponse()

    def trace(self, trace_id: str, count: int) -> dict[str, Span]:
        """Its spans by name, once there are so many."""
        key = bytes.fromhex(trace_id)
        eventually(lambda: len(self.spans.get(key, ())) >= count)
        return {span.name: span for _, span in self.spans[key]}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, Collector]]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", collector
    server.stop(None)


@pytest.fixture(scope="module")
def gateway(
    tiny_home: Path, tiny_redis: str, collector: tuple[str, Collector]
) -> Iterator[Gateway]:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    endpoint = collector[0]
    try:
        with decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1", otlp_endpoint=endpoint):
            yield stack.gateway(otlp_endpoint=endpoint)
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


def ask(gateway: Gateway, *, sampled: bool = True, **changes: Any) -> tuple[int, str, str]:
    """The status, the trace's id, and the span that the client says it is in."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True} | changes
    headers = {"traceparent": f"00-{trace}-{span}-0{int(sampled)}", "x-request-id": "mine"}
    return gateway.post("/v1/completions", json=body, headers=headers).status_code, trace, span


def attributes(span: Span) -> dict[str, str | int]:
    return {one.key: one.value.int_value or one.value.string_value for one in span.attributes}


def test_a_request_is_seen_down_to_its_steps(
    gateway: Gateway, collector: tuple[str, Collector]
) -> None:
    status, trace, parent = ask(gateway)
    assert status == 200
    spans = collector[1].trace(trace, 6)
    whole, worker = spans["POST /v1/completions"], spans["generate"]
    assert whole.parent_span_id.hex() == parent
    assert worker.parent_span_id == spans["prepare"].parent_span_id == whole.span_id
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent_span_id for phase in phases} == {worker.span_id}
    times = [worker.start_time_unix_nano]
    times += [at for one in phases for at in (one.start_time_unix_nano, one.end_time_unix_nano)]
    assert times == sorted(times)
    assert whole.start_time_unix_nano <= times[0] + CLOCKS_NS
    assert times[-1] <= whole.end_time_unix_nano + CLOCKS_NS
    told = attributes(whole)
    assert told["http.response.status_code"] == 200
    assert told["precast.request_id"] == attributes(worker)["precast.request_id"] == "mine"
    for span in (whole, worker):
        assert attributes(span)["gen_ai.usage.input_tokens"] == len(PROMPT)
        assert attributes(span)["gen_ai.usage.output_tokens"] == 8
    services = {service for service, _ in collector[1].spans[bytes.fromhex(trace)]}
    assert services == {"precast-gateway", "precast-decode-worker"}


def test_refusals_are_traced_and_their_texts_are_not(
    gateway: Gateway, collector: tuple[str, Collector]
) -> None:
    status, trace, _ = ask(gateway, prompt="secret", temperature=9)
    assert status == 400
    [(_, span)] = eventually(lambda: collector[1].spans.get(bytes.fromhex(trace)))
    assert attributes(span)["http.response.status_code"] == 400
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert "secret" not in str(collector[1].spans)


def test_what_the_client_does_not_sample_is_not_sent(
    gateway: Gateway, collector: tuple[str, Collector]
) -> None:
    _, unsampled, _ = ask(gateway, sampled=False)
    _, sampled, _ = ask(gateway)
    collector[1].trace(sampled, 6)
    assert bytes.fromhex(unsampled) not in collector[1].spans


def test_a_trace_begins_here_where_the_client_has_none(
    gateway: Gateway, collector: tuple[str, Collector]
) -> None:
    before = set(collector[1].spans)
    body = {"model": MODEL, "input": "abc"}
    answer = gateway.post("/v1/embeddings", json=body, headers={"traceparent": "no such thing"})
    assert answer.status_code == 200
    [trace] = eventually(lambda: set(collector[1].spans) - before)
    spans = collector[1].trace(trace.hex(), 6)
    assert spans["POST /v1/embeddings"].parent_span_id == b""
    assert not any(span.name.startswith("GET") for _, span in collector[1].spans[trace])


def test_a_collector_that_is_away_costs_requests_nothing(
    tiny_home: Path, tiny_redis: str, gateway: Gateway
) -> None:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        lonely = stack.gateway(otlp_endpoint=f"http://127.0.0.1:{free_port()}")
        assert [ask(lonely)[0] for _ in range(3)] == [200] * 3
    finally:
        for process in stack.started:
            process.kill()
            process.wait()
