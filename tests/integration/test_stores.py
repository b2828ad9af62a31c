"""Both kinds of store keep the same contract: on disk, and in a bucket of a real S3 server."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from precast.errors import ArtifactRejected, ConfigError, GraphNotFound, StoreUnavailable
from precast.graphs.artifacts import bucket, object_store
from precast.graphs.artifacts.open_store import open_store
from precast.graphs.artifacts.store import (
    MAX_NOTE_BYTES,
    ArtifactStore,
    VersionExists,
)
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed
from tests.support.compile_worker import ROOT, wait_until
from tests.support.s3_server import S3Server, s3_server

SIGNER = new_signer()
KEY = "0123456789abcdef" * 2


Opener = Callable[[], ArtifactStore]


@pytest.fixture(params=["disk", "s3"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens one store as a further process would: with local copies of its own."""
    if request.param == "disk":
        return lambda: open_store(tmp_path / "store", None)
    url, copies = request.getfixturevalue("s3").new_store(), iter(range(100))
    return lambda: open_store(tmp_path / f"copies-{next(copies)}", url)


@pytest.fixture
def store(opener: Opener) -> ArtifactStore:
    return opener()


def publish(store: ArtifactStore, folder: Path, *, version: int = 1, seed: int = 0) -> str:
    path = graph_file(folder, seed=seed)
    manifest = manifest_for(path.read_bytes(), version=version)
    store.publish(*signed(manifest, SIGNER), path)
    return manifest.key


def test_what_one_publishes_all_can_read(opener: Opener, tmp_path: Path) -> None:
    one, other = opener(), opener()
    key = publish(one, tmp_path)
    publish(other, tmp_path, version=12, seed=2)
    assert one.published_keys() == other.published_keys() == [key]
    assert one.versions(key) == other.versions(key) == [1, 12]
    assert one.last_version(key) == 12
    assert one.open(key).manifest.version == 12
    for _ in range(2):  # the second time from a copy
        artifact = other.open(key, 1)
        assert artifact.graph_path.read_bytes() == graph_file(tmp_path).read_bytes()
    raw, signature = other.read_back(key, 1)
    assert (raw, signature) == (artifact.manifest_bytes, artifact.signature)
    assert raw == signed(artifact.manifest, SIGNER)[0]


def test_graph_of_several_parts(store: ArtifactStore, tmp_path: Path) -> None:
    path = graph_file(tmp_path, size=2 * bucket.PART_BYTES + 12_345)
    manifest = manifest_for(path.read_bytes())
    store.publish(*signed(manifest, SIGNER), path)
    assert store.open(manifest.key).graph_path.read_bytes() == path.read_bytes()


def test_signature_alone_can_be_replaced(opener: Opener, tmp_path: Path) -> None:
    store, other = opener(), new_signer()
    key = publish(store, tmp_path)
    before, [holding] = store.open(key), store.holdings()
    store.resign(key, 1, other.sign(before.manifest_bytes))
    after = opener().open(key)
    assert after.signature.signer == other.id
    assert after.manifest_bytes == before.manifest_bytes
    assert [(h.key, h.version, h.size) for h in store.holdings()] == [(key, 1, holding.size)]
    for missing in ((key, 2), (KEY, 1), ("../x", 1)):
        with pytest.raises(GraphNotFound):
            store.resign(*missing, before.signature)
    assert store.versions(KEY) == []


def test_version_is_published_once(opener: Opener, tmp_path: Path) -> None:
    store = opener()
    key = publish(store, tmp_path)
    before = store.open(key)
    with pytest.raises(VersionExists):
        publish(opener(), tmp_path, seed=1)
    for compiler in ("", "a compiler with a name of some length"):
        path = graph_file(tmp_path, seed=2)
        made = manifest_for(path.read_bytes())
        other = msgspec.structs.replace(made, compiler=compiler)
        with pytest.raises(VersionExists):
            opener().publish(*signed(other, SIGNER), path)
    assert store.open(key) == before
    assert store.read_back(key, 1) == (before.manifest_bytes, before.signature)


def test_of_many_publishers_at_once_one_wins(opener: Opener, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def attempt(seed: int, store: ArtifactStore) -> None:
        try:
            publish(store, tmp_path / str(seed), seed=seed)
        except VersionExists:
            outcomes.append("late")
        else:
            outcomes.append("won")

    threads = [threading.Thread(target=attempt, args=(seed, opener())) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["late"] * 5 + ["won"]
    [key] = opener().published_keys()
    opener().open(key, 1)


def test_unknown_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    assert (store.versions(KEY), store.last_version(KEY)) == ([], 0)
    assert (store.read_note(KEY), store.put_aside(KEY)) == (None, {})
    assert (store.published_keys(), store.holdings()) == ([], [])
    store.remove(KEY, 1)
    store.touch(KEY, 1)
    store.quarantine(KEY, 1, "why")
    key = publish(store, tmp_path)
    for version in (-1, 2, 1 << 63):
        with pytest.raises(GraphNotFound):
            store.open(key, version)
    for name in ("", "..", "../x", "a/b", "A" * 32, "a" * 33):
        for call in (store.open, store.versions, store.last_version, store.read_note):
            with pytest.raises(GraphNotFound, match="no graph key"):
                call(name)


def test_graph_that_differs_from_its_manifest_is_not_published(
    store: ArtifactStore, tmp_path: Path
) -> None:
    path = graph_file(tmp_path)
    raw, signature = signed(manifest_for(path.read_bytes()), SIGNER)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactRejected, match="digest"):
        store.publish(raw, signature, path)
    assert store.published_keys() == []


def test_notes_are_replaced_whole(opener: Opener, tmp_path: Path) -> None:
    one, other = opener(), opener()
    for note in (b"{}", b"x" * 100_000, b"short"):
        one.update_note(KEY, lambda _, note=note: note)  # type: ignore[misc]
        assert other.read_note(KEY) == note
    assert one.published_keys() == [], "a note alone is no graph"


def test_no_update_of_a_note_is_lost(opener: Opener) -> None:
    def append(store: ArtifactStore, letter: bytes) -> None:
        for _ in range(5):
            store.update_note(KEY, lambda note: (note or b"") + letter)

    stores = [opener() for _ in range(4)]
    threads = [
        threading.Thread(target=append, args=(store, bytes([65 + number])))
        for number, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = stores[0].read_note(KEY) or b""
    assert sorted(before) == sorted(b"ABCD" * 5)
    stores[0].update_note(KEY, lambda _: None)
    assert stores[0].read_note(KEY) == before


def test_note_that_can_not_be_read_is_replaced(opener: Opener) -> None:
    store = opener()
    store.update_note(KEY, lambda _: b"x" * (MAX_NOTE_BYTES + 1))
    with pytest.raises(ArtifactRejected, match="exceeds"):
        store.read_note(KEY)
    store.update_note(KEY, lambda note: b"new" if note is None else note)
    assert store.read_note(KEY) == b"new"


def test_quarantined_artifact_is_out_of_service_and_its_number_stays_used(
    opener: Opener, tmp_path: Path
) -> None:
    store, other = opener(), opener()
    key = publish(store, tmp_path)
    publish(store, tmp_path, version=2)
    store.quarantine(key, 2, "crashed a worker")
    store.quarantine(key, 2, "again")
    assert other.versions(key) == [1]
    assert other.put_aside(key) == {2: "crashed a worker"}
    assert other.last_version(key) == 2
    with pytest.raises(GraphNotFound):
        other.open(key, 2)


def test_holdings_tell_size_and_use(store: ArtifactStore, tmp_path: Path) -> None:
    before = time.time() - 2
    key = publish(store, tmp_path)
    publish(store, tmp_path, version=2)
    first, second = sorted(store.holdings(), key=lambda holding: holding.version)
    assert (first.key, first.version, second.version) == (key, 1, 2)
    assert 100_000 < first.size < 110_000
    assert before < first.used_at < time.time() + 2

    def is_newest() -> bool:
        store.touch(key, 1)
        used = {holding.version: holding.used_at for holding in store.holdings()}
        return used[1] > used[2]

    wait_until(is_newest)  # S3 dates objects in whole seconds


def test_removed_artifact_is_gone_and_an_open_file_stays(opener: Opener, tmp_path: Path) -> None:
    store = opener()
    key = publish(store, tmp_path)
    publish(store, tmp_path, version=2)
    with store.open(key, 1).graph_path.open("rb") as file:
        opener().remove(key, 1)
        assert store.versions(key) == [2]
        assert file.read() == graph_file(tmp_path).read_bytes()
    assert [holding.version for holding in store.holdings()] == [2]


PUBLISHER = """
import sys, time
from pathlib import Path
from precast.graphs.artifacts import bucket
from precast.graphs.artifacts import disk_store
from precast.graphs.artifacts.open_store import open_store
from tests.support.artifacts import *

def stall(*_):
    print("stalled", flush=True)
    time.sleep(600)

path = graph_file(Path(sys.argv[2]))
store = open_store(Path(sys.argv[1]), sys.argv[3] or None)
disk_store._sync_tree = bucket.Bucket.create = stall
store.publish(*signed(manifest_for(path.read_bytes()), new_signer()), path)
"""


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_killed_publisher_leaves_nothing_that_counts(
    kind: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.new_store() if kind == "s3" else None
    store = open_store(tmp_path / "store", url)
    program = [sys.executable, "-c", PUBLISHER]
    command = [*program, str(tmp_path / "store"), str(tmp_path / "made"), url or ""]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert store.published_keys() == []
        assert store.sweep() == 0, "what a living publisher has written must stay"
        os.kill(process.pid, signal.SIGKILL)
    monkeypatch.setattr(object_store, "ABANDONED_S", -5.0)
    assert store.sweep() == 1
    assert store.sweep() == 0
    key = publish(store, tmp_path)
    assert store.sweep() == 0
    store.read_back(key, 1)


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path) -> tuple[ArtifactStore, str]:
    url = s3.new_store()
    return open_store(tmp_path / "copies", url), url


Remote = tuple[ArtifactStore, str]


def test_objects_that_were_tampered_with_are_refused(remote: Remote, tmp_path: Path) -> None:
    store, url = remote
    behind = bucket.Bucket(url)
    key = publish(store, tmp_path)
    artifact = store.open(key, 1)
    graph, name = artifact.graph_path.read_bytes(), f"{key}/1/{artifact.manifest.digest}.pt2"
    content = behind.read(f"{key}/1/artifact", 100_000)
    for bad, reason in (
        (graph[:-1] + b"?", "digest"),
        (graph[:-1], "its manifest says"),
        (graph + b"x", "its manifest says"),
    ):
        behind.write(name, bad)
        with pytest.raises(ArtifactRejected, match=reason):
            store.read_back(key, 1)
        assert store.open(key, 1) == artifact, "the local copy is what was signed"
        with pytest.raises(ArtifactRejected, match=reason):
            open_store(tmp_path / "elsewhere", url).open(key, 1)
    behind.write(name, graph)
    artifact.graph_path.write_bytes(b"damaged copy")
    assert store.open(key, 1).graph_path.read_bytes() == graph
    for bad in (b"", b"noise", content[:-1], content * 100, content.partition(b"\n")[2]):
        behind.write(f"{key}/1/artifact", bad)
        with pytest.raises(ArtifactRejected):
            store.open(key, 1)
    behind.write(f"{key}/7/artifact", content)
    with pytest.raises(ArtifactRejected, match="another artifact"):
        store.open(key, 7)
    assert {path.suffix for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()} == set()


def test_local_copies_are_bounded(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MAX_COPIES_BYTES", 250_000)
    store, _ = remote
    for version in (1, 2, 3, 4):
        key = publish(store, tmp_path, version=version, seed=version)
        path = store.open(key, version).graph_path
        assert path.exists()
        os.utime(path, (version, version))
    assert len(list((tmp_path / "copies").glob("*.pt2"))) == 2
    assert store.open(key, 1).graph_path.read_bytes() == graph_file(tmp_path, seed=1).read_bytes()


def test_create_whose_answer_was_lost_counts_as_done(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = bucket.Bucket.create

    def again(self: bucket.Bucket, name: str, content: bytes) -> bool:
        create(self, name, content)
        return create(self, name, content)

    monkeypatch.setattr(bucket.Bucket, "create", again)
    key = publish(remote[0], tmp_path)
    assert remote[0].versions(key) == [1]


def test_store_that_can_not_be_used_ends_a_start(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="s3://none-such/x: no such bucket"):
        open_store(tmp_path, "s3://none-such/x").require_writable()
    store = open_store(tmp_path, s3.new_store())
    store.require_writable()
    for method, header in (("create", "If-None-Match"), ("replace", "If-Match")):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"ignores {header}"):
            patch.setattr(bucket.Bucket, method, lambda *_: True)
            store.require_writable()
    (tmp_path / "file").touch()
    for url in (None, s3.new_store()):
        with pytest.raises(ConfigError, match="store_dir"):
            open_store(tmp_path / "file", url)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_every_call_ends_when_the_bucket_is_out_of_reach(
    fault: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.new_store()
        key = publish(open_store(tmp_path / "copies", url), tmp_path)
        monkeypatch.setattr(bucket, "_REQUEST_S", timedelta(seconds=0.2))
        monkeypatch.setattr(bucket, "_RETRY_S", timedelta(seconds=0.3))
        store = open_store(tmp_path / "copies", url)
        server.process.send_signal(fault)
        for call in (
            lambda: publish(store, tmp_path, version=2),
            lambda: store.open(key, 1),
            lambda: store.update_note(key, lambda _: b"{}"),
            store.published_keys,
        ):
            with pytest.raises(StoreUnavailable, match="s3://bucket") as failure:
                call()
            assert "\n" not in str(failure.value)
