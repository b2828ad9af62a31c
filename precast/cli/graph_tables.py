"""Graphs and recompile events as tables, lines and JSON."""

import json
import time
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.table import Column, Table

from precast.proto.admin.v1 import admin_service_pb2 as admin
from precast.proto.graphs.v1 import graphs_service_pb2 as pb

SHOWN_KEY: Final = 12
_STAGE: Final = "RECOMPILE_STAGE_"
_PHASE: Final = "GRAPH_PHASE_"


def to_json(graphs: Sequence[pb.GraphState], *, single: bool = False) -> str:
    """An array, or an object where ``single``."""
    values = [_dict(graph) for graph in graphs]
    return json.dumps(values[0] if single else values, indent=2, sort_keys=True)


def graph_table(graphs: Sequence[pb.GraphState]) -> RenderableType:
    """One line a graph, by model and size."""
    if not graphs:
        return "no graphs"
    key = Column("key", no_wrap=True, min_width=SHOWN_KEY)
    table = Table(key, "batch", "phase", "version", "layer", "capture", "size", "age", "models")
    for graph in sorted(graphs, key=_order):
        table.add_row(
            graph.key[:SHOWN_KEY],
            graph.factors.get("num_tokens", ""),
            phase(graph) + (f", {len(graph.put_aside)} put aside" if graph.put_aside else ""),
            str(graph.version or ""),
            f"{graph.layer_us:.0f} µs" if graph.layer_us else "",
            f"{graph.capture_s:.1f} s" if graph.capture_s else "",
            f"{graph.size_bytes / 2**20:.1f} MiB" if graph.size_bytes else "",
            age(graph.published_at_s),
            ", ".join(graph.models),
        )
    return table


def detail(graph: pb.GraphState) -> RenderableType:
    """Every field of one graph, and its key's factors."""
    table = Table(show_header=False)
    for name, value in _dict(graph).items():
        if name not in ("factors", "failed_capture"):
            table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    if graph.HasField("failed_capture"):
        _add_failure(table, graph.failed_capture)
    factors = Table("factor", "value")
    for name, value in sorted(graph.factors.items()):
        factors.add_row(name, value)
    return Group(table, factors)


def _add_failure(table: Table, failure: pb.FailedCapture) -> None:
    """Where a failed verification went wrong, where its files are, how to do it again."""
    if failure.HasField("mismatch"):
        found = failure.mismatch
        table.add_row("differs in", f"{found.output} {list(found.index)}, case {found.case}")
        expected = found.expected if found.HasField("expected") else "not finite"
        actual = found.actual if found.HasField("actual") else "not finite"
        table.add_row("expected, actual", f"{expected}, {actual} (bound {found.bound:.0e})")
        for output, difference in sorted(found.differences.items()):
            table.add_row(f"difference of {output}", f"{difference:.2e}")
        table.add_row("contexts", ", ".join(map(str, found.context_lens)))
    table.add_row("files", f"{failure.host}:{failure.folder}: {', '.join(failure.files)}")
    table.add_row("again", failure.command)


def is_failure(event: admin.RecompileResponse) -> bool:
    """Whether the event says that a job ended without a graph that serves."""
    return event.stage in (
        admin.RECOMPILE_STAGE_FAILED,
        admin.RECOMPILE_STAGE_CANCELLED,
        admin.RECOMPILE_STAGE_ROLLED_BACK,
    )


def event_json(event: admin.RecompileResponse) -> str:
    """One line of JSON."""
    value = MessageToDict(
        event, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    value["stage"] = _stage(event)
    value["version"] = event.version
    return json.dumps(value, sort_keys=True)


def event_line(event: admin.RecompileResponse) -> str:
    """One line for people."""
    words = [event.key[:SHOWN_KEY], f"batch {event.num_tokens}", _stage(event)]
    if event.version:
        words.append(f"version {event.version}")
    if event.stage == admin.RECOMPILE_STAGE_ADOPTED:
        words.append(f"by {event.adopted} of {event.workers} workers")
    if event.HasField("canary"):
        words += _canary(event.canary)
    return "  ".join([*words, *([event.detail] if event.detail else [])])


def _canary(canary: admin.CanaryProgress) -> list[str]:
    words = [f"on {canary.worker_id}", f"{canary.steps_done} of {canary.steps} steps"]
    if canary.steps_done:
        words.append(f"difference {canary.max_relative_difference:.1e}")
        words.append(f"time ratio {canary.time_ratio:.2f}")
    return words


def _dict(graph: pb.GraphState) -> dict[str, Any]:
    value = MessageToDict(
        graph, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # protobuf's JSON writes 64-bit numbers as strings
    return value | {
        "phase": phase(graph),
        "version": graph.version,
        "size_bytes": graph.size_bytes,
    }


def phase(graph: pb.GraphState) -> str:
    """``published``, ``queued``, ..."""
    return pb.GraphPhase.Name(graph.phase).removeprefix(_PHASE).lower()


def _stage(event: admin.RecompileResponse) -> str:
    return admin.RecompileStage.Name(event.stage).removeprefix(_STAGE).lower()


def _order(graph: pb.GraphState) -> tuple[str, int, str]:
    size = graph.factors.get("num_tokens", "0")
    return ",".join(graph.models), int(size) if size.isdecimal() else 0, graph.key


def age(published_at_s: float) -> str:
    """``3 min``; "" for 0, which means never."""
    if not published_at_s:
        return ""
    seconds = max(0.0, time.time() - published_at_s)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
