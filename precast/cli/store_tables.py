"""What was removed from a store, or put aside in it, as tables and JSON."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table

from precast.cli.graph_tables import SHOWN_KEY, age
from precast.proto.admin.v1 import admin_service_pb2 as admin


def collected(answer: admin.CollectGarbageResponse) -> dict[str, object]:
    return {
        "bytes_before": answer.bytes_before,
        "bytes_after": answer.bytes_after,
        "bytes_bound": answer.bytes_bound,
        "removed": [
            {
                "key": artifact.key,
                "version": artifact.version,
                "size_bytes": artifact.size_bytes,
                "used_at_s": artifact.used_at_s,
                "reason": artifact.reason,
            }
            for artifact in answer.removed
        ],
    }


def collected_table(answer: admin.CollectGarbageResponse, *, dry_run: bool) -> RenderableType:
    """One line an artifact, and the sums."""
    rows = Table("key", "version", "size", "not used for", "why")
    for artifact in answer.removed:
        rows.add_row(
            artifact.key[:SHOWN_KEY],
            str(artifact.version),
            _mib(artifact.size_bytes),
            age(artifact.used_at_s),
            artifact.reason,
        )
    verb = "would be removed" if dry_run else "removed"
    sums = (
        f"{len(answer.removed)} artifacts {verb}: {_mib(answer.bytes_before)} before, "
        f"{_mib(answer.bytes_after)} after, {_mib(answer.bytes_bound)} allowed"
    )
    return Group(rows, sums) if answer.removed else sums


def scrubbed(answer: admin.ScrubStoreResponse) -> dict[str, object]:
    return {
        "checked": answer.checked,
        "damaged": _damaged(answer.damaged),
    }


def scrubbed_table(answer: admin.ScrubStoreResponse) -> RenderableType:
    """One line a damaged artifact, and the sums."""
    sums = f"{answer.checked} artifacts read, {len(answer.damaged)} put aside"
    return _damage_table("put aside because", answer.damaged, sums)


def resigned(answer: admin.ResignGraphsResponse) -> dict[str, object]:
    return {
        "signer": answer.signer,
        "signed": answer.signed,
        "unchanged": answer.unchanged,
        "refused": _damaged(answer.refused),
    }


def resigned_table(answer: admin.ResignGraphsResponse) -> RenderableType:
    """One line an artifact that was left, and the sums."""
    sums = (
        f"{answer.signed} artifacts signed by {answer.signer}, {answer.unchanged} unchanged, "
        f"{len(answer.refused)} refused"
    )
    return _damage_table("refused because", answer.refused, sums)


def _damaged(artifacts: Iterable[admin.DamagedArtifact]) -> list[dict[str, object]]:
    return [{"key": a.key, "version": a.version, "reason": a.reason} for a in artifacts]


def _damage_table(
    why: str, artifacts: Iterable[admin.DamagedArtifact], sums: str
) -> RenderableType:
    rows = Table("key", "version", why)
    for artifact in artifacts:
        rows.add_row(artifact.key[:SHOWN_KEY], str(artifact.version), artifact.reason)
    return Group(rows, sums) if rows.row_count else sums


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
