"""Graphs as a file: what comes out goes in, and nothing else does."""

import io
import subprocess
import threading
from pathlib import Path

import pytest

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.bundle import write_bundle
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.transfer import (
    import_into_cache,
    import_into_store,
    serving_artifacts,
)
from precast.graphs.artifacts.versions import Lifecycle, Verdict, encode_lifecycle
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed, trust
from tests.support.compile_worker import FACTORS

SIGNER = new_signer()
SIZES = ("1", "2", "4")


def publish(store: DiskStore, folder: Path, *, version: int = 1, num_tokens: str = "1") -> str:
    path = graph_file(folder, seed=int(num_tokens) * 10 + version, size=3000)
    manifest = manifest_for(path.read_bytes(), version=version, num_tokens=num_tokens)
    store.publish(*signed(manifest, SIGNER), path)
    return manifest.key


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    """Three sizes, of one of them two versions."""
    store = DiskStore(tmp_path / "store")
    for size in SIZES:
        publish(store, tmp_path, num_tokens=size)
    publish(store, tmp_path, num_tokens="2", version=2)
    return store


@pytest.fixture
def bundle(store: DiskStore) -> bytes:
    return exported(store)


def exported(store: DiskStore) -> bytes:
    file = io.BytesIO()
    write_bundle(file, serving_artifacts(store, trust(SIGNER)))
    return file.getvalue()


def test_what_serves_goes_from_a_store_into_another(store: DiskStore, tmp_path: Path) -> None:
    other = DiskStore(tmp_path / "other")
    raw = exported(store)
    first = import_into_store(io.BytesIO(raw), other, trust(SIGNER))
    again = import_into_store(io.BytesIO(raw), other, trust(SIGNER))
    assert (len(first.added), len(first.present)) == (3, 0)
    assert (len(again.added), len(again.present)) == (0, 3)
    assert other.published_keys() == store.published_keys()
    for key in store.published_keys():
        there = other.open(key)
        assert other.versions(key) == [store.versions(key)[-1]]
        assert there.manifest_bytes == store.open(key).manifest_bytes
        assert there.graph_path.read_bytes() == store.open(key).graph_path.read_bytes()
    assert exported(other) == raw, "the same graphs give the same file"


def test_decisions_on_versions_are_followed(store: DiskStore, tmp_path: Path) -> None:
    key = publish(store, tmp_path, num_tokens="4", version=2)
    store.update_note(key, lambda _: encode_lifecycle(Lifecycle().marked(2, Verdict.CANDIDATE)))
    numbers = {a.manifest.key: a.manifest.version for a in serving_artifacts(store, trust(SIGNER))}
    assert sorted(numbers.values()) == [1, 1, 2]
    assert numbers[key] == 1


def test_model_and_sizes_choose(store: DiskStore) -> None:
    def sizes(**choice: object) -> list[str]:
        chosen = serving_artifacts(store, trust(SIGNER), **choice)  # type: ignore[arg-type]
        return [artifact.manifest.factors["num_tokens"] for artifact in chosen]

    assert sizes(model="tiny") == ["1", "2", "4"]
    assert sizes(sizes=[1, 4]) == ["1", "4"]
    first = serving_artifacts(store, trust(SIGNER))[0].manifest.key
    store.update_note(first, lambda _: encode_lifecycle(Lifecycle().labelled("later")))
    assert sizes(model="later") == ["1"]
    with pytest.raises(GraphNotFound, match="for 'other'"):
        sizes(model="other")


def test_cache_takes_a_bundle_and_gives_it_on(
    store: DiskStore, bundle: bytes, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    cache = GraphCache(root, trust(SIGNER))
    assert len(import_into_cache(io.BytesIO(bundle), cache, trust(SIGNER)).added) == 3
    assert len(import_into_cache(io.BytesIO(bundle), cache, trust(SIGNER)).present) == 3
    for size in SIZES:
        found = GraphCache(root, trust(SIGNER)).find({**FACTORS, "num_tokens": size})
        assert found and found.manifest.version == (2 if size == "2" else 1)
    assert exported(DiskStore(root)) == bundle


def test_tar_reads_it(bundle: bytes, store: DiskStore) -> None:
    listed = subprocess.run(["tar", "t"], input=bundle, capture_output=True, check=True).stdout
    names = listed.decode().split()
    assert names[0] == "contents.json"
    assert len(names) == 1 + 3 * len(SIZES)
    assert {name.split("/")[0] for name in names[1:]} == set(store.published_keys())


def test_graph_without_a_trusted_signature_is_not_exported(store: DiskStore) -> None:
    with pytest.raises(ArtifactRejected, match="not trusted"):
        serving_artifacts(store, trust(new_signer()))


def test_imports_at_the_same_time_all_succeed(bundle: bytes, tmp_path: Path) -> None:
    outcomes: list[int] = []

    def attempt(store: DiskStore) -> None:
        imported = import_into_store(io.BytesIO(bundle), store, trust(SIGNER))
        outcomes.append(len(imported.added) + len(imported.present))

    for number in range(5):
        store = DiskStore(tmp_path / f"into-{number}")
        threads = [threading.Thread(target=attempt, args=(store,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert exported(store) == bundle
    assert outcomes == [len(SIZES)] * 20


def test_stranger_is_not_trusted(bundle: bytes, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "into")
    with pytest.raises(ArtifactRejected, match="not trusted"):
        import_into_store(io.BytesIO(bundle), store, trust(new_signer()))
    assert store.published_keys() == []


def test_what_was_put_aside_does_not_come_back(store: DiskStore, bundle: bytes) -> None:
    first = store.published_keys()[0]
    number = store.versions(first)[-1]
    store.quarantine(first, number, "crashed")
    with pytest.raises(ArtifactRejected, match=f"{first}/{number}: was put aside here: crashed"):
        import_into_store(io.BytesIO(bundle), store, trust(SIGNER))
    cache = GraphCache(store.root, trust(SIGNER))
    with pytest.raises(ArtifactRejected, match=f"{first}/{number}: .* was put aside: crashed"):
        import_into_cache(io.BytesIO(bundle), cache, trust(SIGNER))


def test_what_was_quarantined_does_not_come_back(
    store: DiskStore, bundle: bytes, tmp_path: Path
) -> None:
    key = store.published_keys()[0]
    number = store.versions(key)[-1]
    other = DiskStore(tmp_path / "other")
    other.update_note(
        key, lambda _: encode_lifecycle(Lifecycle().marked(number, Verdict.QUARANTINED, "wrong"))
    )
    with pytest.raises(ArtifactRejected, match=f"{key}/{number}: was quarantined here: wrong"):
        import_into_store(io.BytesIO(bundle), other, trust(SIGNER))
    assert other.published_keys() == []


def test_other_capture_of_the_same_number_stays(
    bundle: bytes, store: DiskStore, tmp_path: Path
) -> None:
    other = DiskStore(tmp_path / "other")
    key = publish(other, tmp_path / "made")
    path = graph_file(tmp_path, seed=99)
    manifest = manifest_for(path.read_bytes())
    third = DiskStore(tmp_path / "third")
    third.publish(*signed(manifest, SIGNER), path)
    with pytest.raises(ArtifactRejected, match=f"{key}/1: another capture"):
        import_into_store(io.BytesIO(bundle), third, trust(SIGNER))
    assert third.open(key).manifest == manifest
