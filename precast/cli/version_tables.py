"""A graph's versions as a table and JSON."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from precast.cli.graph_tables import age
from precast.proto.admin.v1 import admin_service_pb2 as admin

_STATE = "VERSION_STATE_"


def to_json(versions: Sequence[admin.Version]) -> list[dict[str, object]]:
    """An object for each version, newest first."""
    return [
        {
            "version": version.version,
            "state": _state(version),
            "pinned": version.pinned,
            "reason": version.reason,
            "published_at_s": version.published_at_s,
            "size_bytes": version.size_bytes,
            "max_relative_error": version.max_relative_error,
            "layer_us": version.layer_us,
        }
        for version in versions
    ]


def table(versions: Sequence[admin.Version]) -> RenderableType:
    """One line a version, newest first."""
    rows = Table("version", "state", "age", "layer", "error", "reason")
    for version in versions:
        rows.add_row(
            str(version.version),
            _state(version) + (", pinned" if version.pinned else ""),
            age(version.published_at_s),
            f"{version.layer_us:.0f} µs" if version.layer_us else "",
            f"{version.max_relative_error:.1e}" if version.published_at_s else "",
            version.reason,
        )
    return rows


def _state(version: admin.Version) -> str:
    return admin.VersionState.Name(version.state).removeprefix(_STATE).lower()
