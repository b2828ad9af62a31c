"""A signing key is replaced, and another revoked, in a fleet that serves."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.graphs.artifacts.disk_store import DiskStore
from tests.support.command import precast
from tests.support.decode_worker import eventually
from tests.support.graph_fleet import Fleet, ask, fleet, new_home, runs, traffic, version
from tests.support.ports import free_port

UNTRIED: dict[str, Any] = {"canary_steps": 0}
pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def home(tmp_path: Path, tiny_package: Path) -> Path:
    return new_home(tmp_path / "home", tiny_package)


@pytest.fixture
def graphs(home: Path, redis_url: str) -> Iterator[Fleet]:
    with fleet(home, redis_url, **UNTRIED) as running:
        yield running


def signer_of(folder: Path, key: str) -> str:
    return DiskStore(folder).open(key).signature.signer


def cached(home: Path) -> list[str]:
    return DiskStore(home / "cache" / "graphs").published_keys()


def keys(fleet: Fleet, *arguments: str) -> str:
    done = precast("keys", *arguments, "--home", str(fleet.home))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_key_is_rotated_without_an_eager_step(graphs: Fleet, home: Path) -> None:
    with graphs.decode_worker() as worker:
        runs(worker, 1)
        key, eager = graphs.key(), worker.status().eager_steps
        old = signer_of(home / "store", key)
        with traffic(worker):
            keys(graphs, "rotate")
            assert graphs.recompile()[-1].adopted == 1
            new = signer_of(home / "store", key)
            assert new != old
            resigned = graphs.cli("resign", "--json")
            assert '"signed": 1' in resigned.stdout, resigned.stderr
            assert graphs.cli("rollback", key).returncode == 0
            runs(worker, 1)
            store, cache = DiskStore(home / "store"), DiskStore(home / "cache" / "graphs")
            assert store.open(key, 1).signature.signer == new
            eventually(lambda: cache.open(key, 1).signature.signer == new)
            keys(graphs, "revoke", old)
            eventually(lambda: worker.log.read_text().count("trusted keys") == 3)
            assert '"unchanged": 2' in graphs.cli("resign", "--json").stdout
        assert (version(worker), worker.status().eager_steps) == (1, eager)
        assert worker.status().restarts == 0
    with graphs.decode_worker() as again:
        runs(again, 1)


def test_revoked_keys_graph_is_dropped_and_replaced(graphs: Fleet, home: Path) -> None:
    with graphs.decode_worker() as worker:
        runs(worker, 1)
        tokens, key = ask(worker), graphs.key()
        old = signer_of(home / "store", key)
        keys(graphs, "rotate")
        keys(graphs, "revoke", old)
        eventually(lambda: version(worker) == 0)
        assert cached(home) == []
        assert ask(worker) == tokens, "served eagerly"
        assert worker.status().restarts == 0
        # the store still has it, and nobody may vouch for it any more
        eventually(lambda: "artifact rejected" in worker.log.read_text())
        refused = graphs.cli("resign")
        assert refused.returncode == 1
        assert "not trusted" in " ".join(refused.stdout.split())
        assert version(worker) == 0
        graphs.recompile()
        runs(worker, 2)
        assert ask(worker) == tokens


def test_new_workers_key_counts_once_it_is_trusted(
    graphs: Fleet, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "trusted").mkdir()
    [ours] = (home / "keys" / "trusted").glob("*.pub")
    (tmp_path / "trusted" / "readme.txt").write_text("none yet")
    with graphs.decode_worker(trusted_keys_dir=tmp_path / "trusted") as worker:
        ask(worker)
        assert version(worker) == 0
        done = precast("keys", "trust", str(ours), "--trusted-keys-dir", str(tmp_path / "trusted"))
        assert done.returncode == 0, done.stderr
        runs(worker, 1)


def gauge(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    name = "decode_worker_unsigned_graphs_allowed"
    [value] = [line.split()[1] for line in lines if line.startswith(name + " ")]
    return float(value)


def unsign(home: Path) -> None:
    [path] = (home / "store").glob("*/1/manifest.sig")
    path.write_bytes(b"unsigned\n")


def test_unsigned_graph_needs_a_loud_switch(graphs: Fleet, home: Path, tmp_path: Path) -> None:
    with graphs.decode_worker(cache_dir=tmp_path / "first") as worker:
        runs(worker, 1)
    unsign(home)
    port = free_port()
    with graphs.decode_worker(cache_dir=tmp_path / "strict", metrics_port=port) as worker:
        eventually(lambda: "not signed" in worker.log.read_text())
        ask(worker)
        assert (version(worker), gauge(port)) == (0, 0.0)
    port = free_port()
    with graphs.decode_worker(
        cache_dir=tmp_path / "loose", metrics_port=port, allow_unsigned_graphs=True
    ) as worker:
        runs(worker, 1)
        ask(worker)
        assert gauge(port) == 1.0
        text = worker.log.read_text()
        assert "UNSIGNED GRAPHS ARE ALLOWED" in text
        assert text.count("LOADING UNSIGNED NATIVE CODE") == 1
    # what it has cached is of no use to a worker without the switch
    with graphs.decode_worker(cache_dir=tmp_path / "loose") as worker:
        eventually(lambda: "not signed" in worker.log.read_text())
        assert version(worker) == 0
