"""Takes a model's graphs out of a store or a decode worker's cache, and puts them into another.

Out go the versions that serve, as far as the decisions beside the artifacts say; a cache has no
such notes, and never holds anything newer than what serves. In goes a bundle's content as a whole
or not at all, and nothing that was put aside or quarantined there. What was imported serves from
then on if it is the newest good version: it has been verified, but no canary tries it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.bundle import Unpacked, unpack_bundle
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.store import ArtifactStore, StoredArtifact, VersionExists
from precast.graphs.artifacts.trust import Trust
from precast.graphs.artifacts.versions import Lifecycle, Verdict, decode_lifecycle
from precast.graphs.key import spec_part
from precast.system.scratch import scratch_folder


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of a bundle's graphs."""

    added: list[Unpacked]
    present: list[Unpacked]
    """Were there already, with the same bytes."""


def serving_artifacts(
    store: ArtifactStore,
    trusted: Trust,
    *,
    model: str = "",
    sizes: Collection[int] = (),
) -> list[StoredArtifact]:
    """The versions that serve, verified; of all models and sizes where none is named.

    Raises ``GraphNotFound`` if there are none, ``ArtifactRejected`` for the first bad one.
    """
    found = []
    for key in store.published_keys():
        lifecycle = _lifecycle(store, key)
        version = lifecycle.serving(store.versions(key))
        artifact = store.open(key, version) if version else None
        if artifact and _matches(artifact, lifecycle.models, model, sizes):
            trusted.verify(artifact.manifest_bytes, artifact.signature)
            found.append(artifact)
    if not found:
        wanted = f" for {model!r}" if model else ""
        raise GraphNotFound(f"no graph to export{wanted} in {store.location}")
    return sorted(found, key=lambda artifact: (_num_tokens(artifact), artifact.manifest.key))


def import_into_store(file: BinaryIO, store: ArtifactStore, trusted: Trust) -> Imported:
    """Publish a bundle's graphs in a compile worker's store. Raises ``ArtifactRejected`` or
    ``ConfigError``."""
    store.require_writable()

    def is_present(graph: Unpacked) -> bool:
        key, version = graph.manifest.key, graph.manifest.version
        lifecycle = _lifecycle(store, key)
        if lifecycle.verdict(version) is Verdict.QUARANTINED:
            raise ArtifactRejected(f"was quarantined here: {lifecycle.reason(version)}")
        if version in (aside := store.put_aside(key)):
            raise ArtifactRejected(f"was put aside here: {aside[version]}")
        if version not in store.versions(key):
            return False
        if store.open(key, version).manifest != graph.manifest:
            raise ArtifactRejected("another capture has this version's number here")
        return True

    def publish(graph: Unpacked) -> None:
        try:
            store.publish(graph.manifest_bytes, graph.signature, graph.graph_path)
        except VersionExists:  # since we looked
            _checked(graph, is_present)

    return _import(file, store.temporary, trusted, is_present, publish)


def import_into_cache(file: BinaryIO, cache: GraphCache, trusted: Trust) -> Imported:
    """Put a bundle's graphs into a decode worker's cache. Raises ``ArtifactRejected``."""

    def is_present(graph: Unpacked) -> bool:
        spec = spec_part(graph.manifest.factors)
        cache.check(graph.manifest_bytes, graph.signature, spec)
        try:
            present = cache.open(graph.manifest.key, graph.manifest.version, spec)
        except (GraphNotFound, ArtifactRejected):
            return False
        return present.manifest == graph.manifest

    def add(graph: Unpacked) -> None:
        cache.add(graph.manifest_bytes, graph.signature, graph.graph_path)

    return _import(file, cache.temporary, trusted, is_present, add)


def _import(
    file: BinaryIO,
    scratch: Path,
    trusted: Trust,
    is_present: Callable[[Unpacked], bool],
    add: Callable[[Unpacked], None],
) -> Imported:
    """Verify all of a bundle before any of it is added."""
    with scratch_folder(scratch, "import") as folder:
        graphs = unpack_bundle(file, folder, trusted)
        present = [graph for graph in graphs if _checked(graph, is_present)]
        added = [graph for graph in graphs if graph not in present]
        for graph in added:
            add(graph)
    return Imported(added=added, present=present)


def _checked(graph: Unpacked, is_present: Callable[[Unpacked], bool]) -> bool:
    try:
        return is_present(graph)
    except ArtifactRejected as error:
        name = f"{graph.manifest.key}/{graph.manifest.version}"
        raise ArtifactRejected(f"graph {name}: {error}") from None


def _lifecycle(store: ArtifactStore, key: str) -> Lifecycle:
    note = store.read_note(key)
    try:
        return decode_lifecycle(note) if note is not None else Lifecycle()
    except msgspec.DecodeError as error:
        raise ArtifactRejected(f"note on the versions of {key}: {error}") from None


def _matches(
    artifact: StoredArtifact, models: Sequence[str], model: str, sizes: Collection[int]
) -> bool:
    """``models``: those that asked for it after it was captured."""
    return model in ("", *artifact.manifest.models, *models) and (
        not sizes or _num_tokens(artifact) in sizes
    )


def _num_tokens(artifact: StoredArtifact) -> int:
    return int(artifact.manifest.factors["num_tokens"])
