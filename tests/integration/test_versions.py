"""Versions that are rolled back, pinned or quarantined while workers serve."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.graphs.artifacts.disk_store import DiskStore
from precast.system.redis_server import start_redis
from tests.support.decode_worker import eventually
from tests.support.graph_fleet import Fleet, ask, fleet, new_home, runs, traffic, version
from tests.support.native_faults import crashing, crashing_if

UNTRIED: dict[str, Any] = {"canary_steps": 0}
FEW = 4
"""Tokens: fewer replays than a graph needs before a crash is no longer its own."""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def home(tmp_path: Path, tiny_package: Path) -> Path:
    return new_home(tmp_path / "home", tiny_package)


@pytest.fixture
def graphs(home: Path, redis_url: str) -> Iterator[Fleet]:
    with fleet(home, redis_url, **UNTRIED) as running:
        yield running


def test_rollback_and_pins_move_workers_that_serve(graphs: Fleet, home: Path) -> None:
    with graphs.decode_worker() as worker:
        runs(worker, 1)
        key = graphs.key()
        with traffic(worker):
            assert graphs.recompile()[-1].adopted == 1
            assert graphs.cli("rollback", key).returncode == 0
            runs(worker, 1)
            assert graphs.states() == {2: "rolled_back", 1: "serving"}

            # the next recompile goes on from there; by number one may go back and forth
            assert graphs.recompile()[-1].version == 3
            runs(worker, 3)
            assert graphs.cli("rollback", key, "--to", 2).returncode == 0
            runs(worker, 2)
            assert graphs.states() == {3: "rolled_back", 2: "serving", 1: "previous"}

            assert graphs.cli("pin-version", key, 1).returncode == 0
            runs(worker, 1)
            assert graphs.recompile()[-1].detail == "pinned to version 1"
            assert version(worker) == 1
            expected = {4: "waiting", 3: "rolled_back", 2: "waiting", 1: "serving!"}
            assert graphs.states() == expected
            refused = graphs.cli("rollback", key)
            assert (refused.returncode, "unpin it first" in refused.stderr) == (2, True)
            assert graphs.cli("unpin-version", key).returncode == 0
            runs(worker, 4)

        for command, said in (
            (("rollback", key, "--to", 9), "no version 9"),
            (("pin-version", key, 9), "no version 9"),
            (("versions", "f" * 12), "no graph"),
        ):
            refused = graphs.cli(*command)
            assert refused.returncode != 0
            assert said in refused.stderr
            assert refused.stderr.count("\n") == 1


def test_decisions_outlive_the_compile_worker_and_redis(
    home: Path, tmp_path: Path, redis_url: str
) -> None:
    with fleet(home, redis_url, **UNTRIED) as graphs, graphs.decode_worker() as worker:
        runs(worker, 1)
        graphs.recompile()
        key = graphs.key()
        graphs.cli("rollback", key)
        runs(worker, 1)
    with start_redis(tmp_path / "another") as empty, fleet(home, empty.url, **UNTRIED) as graphs:
        assert graphs.states() == {2: "rolled_back", 1: "serving"}
        # a worker whose cache has the newer one does not take it up again
        with graphs.decode_worker() as worker:
            runs(worker, 1)
            assert ask(worker)
            assert version(worker) == 1


def test_one_crash_quarantines_a_graph_everywhere(
    graphs: Fleet, home: Path, tmp_path: Path, tiny_package: Path
) -> None:
    with (
        graphs.decode_worker(cache_dir=tmp_path / "one") as busy,
        graphs.decode_worker(cache_dir=tmp_path / "two") as idle,
    ):
        runs(busy, 1)
        runs(idle, 1)
        expected = ask(busy)
        ask(idle)
        crashing(tiny_package, graphs.package)
        assert graphs.recompile()[-1].adopted == 2

        client = busy.client()
        client.start("doomed", busy.request([1, 2, 3], 12))
        assert client.finish("doomed", 60).end.WhichOneof("event") == "finished"
        runs(busy, 1)
        runs(idle, 1)
        assert ask(busy) == ask(idle) == expected
        assert (busy.status().restarts, idle.status().restarts) == (1, 0)
        assert graphs.states() == {2: "quarantined", 1: "serving"}
        assert "SIGSEGV" in graphs.cli("versions", graphs.key()).stdout
        refused = graphs.cli("rollback", graphs.key(), "--to", 2)
        assert (refused.returncode, "quarantined" in refused.stderr) == (2, True)
        for name in ("one", "two"):
            assert DiskStore(tmp_path / name).versions(graphs.key()) == [1]

    # a worker whose cache holds the graph still, as if it had been down meanwhile
    store = home / "store" / graphs.key()
    shutil.copytree(store / "2", tmp_path / "two" / graphs.key() / "2")
    with graphs.decode_worker(cache_dir=tmp_path / "two") as returned:
        runs(returned, 1)
        assert ask(returned) == expected
        assert returned.status().restarts == 0


def test_a_crash_while_no_compile_worker_is_there_is_reported_later(
    home: Path, redis_url: str, tiny_package: Path
) -> None:
    with fleet(home, redis_url, **UNTRIED) as graphs, graphs.decode_worker() as worker:
        runs(worker, 1)
        ask(worker)
        crashing(tiny_package, graphs.package)
        assert graphs.recompile()[-1].adopted == 1
        key = graphs.key()
        graphs.compiler.kill()
        client = worker.client()
        client.start("doomed", worker.request([1, 2, 3], 12))
        assert client.finish("doomed", 60).end.WhichOneof("event") == "finished"
        runs(worker, 1)
        ask(worker)
    with fleet(home, redis_url, **UNTRIED) as graphs:
        assert graphs.states() == {2: "serving", 1: "previous"}, "nobody has told it yet"
        with graphs.decode_worker() as worker:  # the one that crashed, started again
            eventually(lambda: graphs.states() == {2: "quarantined", 1: "serving"})
            runs(worker, 1)
            assert worker.status().restarts == 0
        assert graphs.key() == key


def test_a_lifted_quarantine_ends_everywhere_and_may_come_again(
    home: Path, redis_url: str, tmp_path: Path, tiny_package: Path
) -> None:
    """Of a graph whose crashes had a cause outside, which an operator has mended."""
    fault = tmp_path / "fault"
    crashing_if(tiny_package, home / "ledger" / "package", fault)
    with (
        fleet(home, redis_url, **UNTRIED) as graphs,
        graphs.decode_worker(cache_dir=tmp_path / "one") as hurt,
        graphs.decode_worker(cache_dir=tmp_path / "two") as idle,
    ):
        for worker in (hurt, idle):
            runs(worker, 1)
        expected = ask(hurt, FEW)
        refused = graphs.cli("lift-quarantine", graphs.key(), 1)
        assert (refused.returncode, "not quarantined" in refused.stderr) == (2, True)
        for restarts in (1, 2):
            fault.touch()
            assert ask(hurt, FEW) == expected
            fault.unlink()
            assert hurt.status().restarts == restarts
            eventually(lambda: graphs.states() == {1: "quarantined"})
            eventually(lambda: version(hurt) == version(idle) == 0)
            lifted = graphs.cli("lift-quarantine", graphs.key(), 1)
            assert lifted.stdout == f"{graphs.key()}  version 1 serves\n", lifted.stderr
            for worker in (hurt, idle):
                runs(worker, 1)
                assert ask(worker, FEW) == expected
            assert graphs.states() == {1: "serving"}
        unknown = graphs.cli("lift-quarantine", graphs.key(), 7)
        assert (unknown.returncode, "no version 7" in unknown.stderr) == (1, True)
        # what it reported before the lift is no news when it starts again
        with graphs.decode_worker(cache_dir=tmp_path / "one") as returned:
            runs(returned, 1)
            assert ask(returned, FEW) == expected
        assert graphs.states() == {1: "serving"}


def test_a_graph_without_a_good_version_is_not_captured_again_by_itself(
    home: Path, redis_url: str, tmp_path: Path, tiny_package: Path
) -> None:
    crashing(tiny_package, home / "ledger" / "package")
    with fleet(home, redis_url, **UNTRIED) as graphs, graphs.decode_worker() as worker:
        runs(worker, 1)
        client = worker.client()
        client.start("doomed", worker.request([1, 2, 3], 12))
        assert client.finish("doomed", 60).end.WhichOneof("event") == "finished"
        eventually(worker.is_ready)
        expected = ask(worker)
        assert version(worker) == 0
        eventually(lambda: graphs.states() == {1: "quarantined"})
    with (
        start_redis(tmp_path / "another") as empty,
        fleet(home, empty.url, **UNTRIED) as graphs,
        graphs.decode_worker() as worker,
    ):
        eventually(lambda: "version 1 is quarantined" in worker.log.read_text())
        assert graphs.states() == {1: "quarantined"}
        # by hand it is
        shutil.copyfile(tiny_package, graphs.package)
        graphs.recompile()
        runs(worker, 2)
        assert ask(worker) == expected


def test_ranks_that_are_killed_quarantine_nothing(graphs: Fleet) -> None:
    with graphs.decode_worker() as worker:
        runs(worker, 1)
        for restarts in (1, 2, 3):
            os.kill(worker.ranks()[0], signal.SIGKILL)
            eventually(lambda wanted=restarts: worker.status().restarts == wanted)
            eventually(worker.is_ready)
            runs(worker, 1)
            assert ask(worker, 2)
        assert graphs.states() == {1: "serving"}
