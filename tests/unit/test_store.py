"""The artifact store on disk: atomic, exclusive, checked, swept."""

from pathlib import Path

import pytest

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.disk_store import QUARANTINE, DiskStore
from precast.system.scratch import scratch_folder, sweep
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed

SIGNER = new_signer()


def publish(store: DiskStore, folder: Path, *, version: int = 1, seed: int = 0) -> str:
    path = graph_file(folder, seed=seed)
    manifest = manifest_for(path.read_bytes(), version=version)
    store.publish(*signed(manifest, SIGNER), path)
    return manifest.key


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "a/b", "/etc/passwd", "\x00", "é" * 32, "A" * 32, "a" * 33]
)
def test_what_is_no_key_never_becomes_a_path(tmp_path: Path, key: str) -> None:
    store = DiskStore(tmp_path / "store")
    for call in (store.open, store.versions, store.last_version):
        with pytest.raises(GraphNotFound, match="no graph key"):
            call(key)
    with pytest.raises(GraphNotFound):
        store.quarantine(key, 1, "why")


def test_link_that_leads_out_of_the_store_is_not_followed(tmp_path: Path) -> None:
    inside, outside = DiskStore(tmp_path / "store"), DiskStore(tmp_path / "elsewhere")
    key = publish(outside, tmp_path)
    (inside.root / key).symlink_to(outside.root / key)
    with pytest.raises(GraphNotFound):
        inside.open(key, 1)


def test_graph_that_is_a_link_is_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    path = store.open(key).graph_path
    path.rename(tmp_path / "moved.pt2")
    path.symlink_to(tmp_path / "moved.pt2")
    with pytest.raises(ArtifactRejected, match="no regular file"):
        store.open(key)


def test_artifact_moved_under_another_number_is_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    (store.root / key / "1").rename(store.root / key / "7")
    with pytest.raises(ArtifactRejected, match="another artifact"):
        store.open(key)


def test_quarantined_artifact_is_out_of_service_and_its_number_stays_used(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    publish(store, tmp_path, version=2)
    store.quarantine(key, 2, "crashed a worker")
    store.quarantine(key, 2, "again")
    assert store.versions(key) == [1]
    assert store.last_version(key) == 2
    [kept] = (store.root / QUARANTINE).iterdir()
    assert (kept / "reason.txt").read_text() == "crashed a worker\n"


def test_scratch_folder_goes_at_its_end_and_sweep_spares_it_before(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    with pytest.raises(RuntimeError), scratch_folder(root, "x") as folder:
        (folder / "file").write_text("content")
        assert sweep(root) == 0
        raise RuntimeError
    assert list(root.iterdir()) == []
    assert sweep(tmp_path / "none") == 0
