"""The artifact store on disk: atomic, exclusive, checked, swept."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.scratch import scratch_folder, sweep
from precast.graphs.store import QUARANTINE, TEMPORARY, DiskStore, GenerationExists
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed
from tests.support.compile_worker import ROOT

SIGNER = new_signer()


def publish(store: DiskStore, folder: Path, *, generation: int = 1, seed: int = 0) -> str:
    path = graph_file(folder, seed=seed)
    manifest = manifest_for(path.read_bytes(), generation=generation)
    store.publish(*signed(manifest, SIGNER), path)
    return manifest.key


def test_published_artifact_is_found_by_key_and_generation(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    publish(store, tmp_path, generation=2, seed=2)
    assert store.published_keys() == [key]
    assert store.generations(key) == [1, 2]
    assert store.open(key).manifest.generation == 2
    first = store.open(key, 1)
    assert first.graph_path.read_bytes() == graph_file(tmp_path).read_bytes()
    assert list((store.root / TEMPORARY).iterdir()) == []


def test_generation_is_published_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    before = store.open(key)
    with pytest.raises(GenerationExists):
        publish(store, tmp_path, seed=1)
    assert store.open(key) == before


def test_of_many_publishers_at_once_one_wins(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    outcomes: list[bool] = []

    def attempt(seed: int) -> None:
        try:
            publish(store, tmp_path, seed=seed)
        except GenerationExists:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_graph_that_differs_from_its_manifest_is_not_published(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    path = graph_file(tmp_path)
    raw, signature = signed(manifest_for(path.read_bytes()), SIGNER)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactRejected, match="digest"):
        store.publish(raw, signature, path)
    assert store.published_keys() == []


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "a/b", "/etc/passwd", "\x00", "é" * 32, "A" * 32, "a" * 33]
)
def test_what_is_no_key_never_becomes_a_path(tmp_path: Path, key: str) -> None:
    store = DiskStore(tmp_path / "store")
    for call in (store.open, store.generations, store.last_generation):
        with pytest.raises(GraphNotFound, match="no graph key"):
            call(key)
    with pytest.raises(GraphNotFound):
        store.quarantine(key, 1, "why")


@pytest.mark.parametrize("generation", [-1, 2, 1 << 63])
def test_unknown_generation_is_not_found(tmp_path: Path, generation: int) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path)
    with pytest.raises(GraphNotFound):
        store.open(key, generation)


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
    publish(store, tmp_path, generation=2)
    store.quarantine(key, 2, "crashed a worker")
    store.quarantine(key, 2, "again")
    assert store.generations(key) == [1]
    assert store.last_generation(key) == 2
    [kept] = (store.root / QUARANTINE).iterdir()
    assert (kept / "reason.txt").read_text() == "crashed a worker\n"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    for generation in (1, 2, 3, 10):
        key = publish(store, tmp_path, generation=generation)
    store.prune(key, 2)
    assert store.generations(key) == [3, 10]


PUBLISHER = """
import sys, time
from pathlib import Path
from precast.graphs import store as module
from tests.support.artifacts import *

def stall(folder):
    print("stalled", flush=True)
    time.sleep(600)

module._sync_tree = stall
path = graph_file(Path(sys.argv[2]))
store = module.DiskStore(Path(sys.argv[1]))
store.publish(*signed(manifest_for(path.read_bytes()), new_signer()), path)
"""


def test_killed_publisher_leaves_nothing_that_counts(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    command = [sys.executable, "-c", PUBLISHER, str(store.root), str(tmp_path / "made")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert store.sweep() == 0, "a living publisher's folder must stay"
        os.kill(process.pid, signal.SIGKILL)
    assert store.published_keys() == []
    assert len(list((store.root / TEMPORARY).iterdir())) == 1
    assert store.sweep() == 1
    assert list((store.root / TEMPORARY).iterdir()) == []


def test_scratch_folder_goes_at_its_end_and_sweep_spares_it_before(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    with pytest.raises(RuntimeError), scratch_folder(root, "x") as folder:
        (folder / "file").write_text("content")
        assert sweep(root) == 0
        raise RuntimeError
    assert list(root.iterdir()) == []
    assert sweep(tmp_path / "none") == 0
