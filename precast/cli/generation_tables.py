"""A graph's generations as a table and JSON."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from precast.cli.graph_tables import age
from precast.proto.admin.v1 import admin_service_pb2 as admin

_STATE = "GENERATION_STATE_"


def to_json(generations: Sequence[admin.Generation]) -> list[dict[str, object]]:
    """An object for each generation, newest first."""
    return [
        {
            "generation": generation.generation,
            "state": _state(generation),
            "pinned": generation.pinned,
            "reason": generation.reason,
            "published_at_s": generation.published_at_s,
            "size_bytes": generation.size_bytes,
            "max_relative_error": generation.max_relative_error,
            "layer_us": generation.layer_us,
        }
        for generation in generations
    ]


def table(generations: Sequence[admin.Generation]) -> RenderableType:
    """One line a generation, newest first."""
    rows = Table("gen", "state", "age", "layer", "error", "reason")
    for generation in generations:
        rows.add_row(
            str(generation.generation),
            _state(generation) + (", pinned" if generation.pinned else ""),
            age(generation.published_at_s),
            f"{generation.layer_us:.0f} µs" if generation.layer_us else "",
            f"{generation.max_relative_error:.1e}" if generation.published_at_s else "",
            generation.reason,
        )
    return rows


def _state(generation: admin.Generation) -> str:
    return admin.GenerationState.Name(generation.state).removeprefix(_STATE).lower()
