"""A new version is tried by one worker, then promoted everywhere or rolled back."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.graphs.artifacts.disk_store import DiskStore
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from tests.support.decode_worker import DecodeWorker, eventually
from tests.support.graph_fleet import Fleet, ask, fleet, new_home, runs, traffic, version
from tests.support.native_faults import crashing, slow, wrong

pytestmark = pytest.mark.timeout(300)

CANARY, PUBLISHED = admin_pb.RECOMPILE_STAGE_CANARY, admin_pb.RECOMPILE_STAGE_PUBLISHED
ADOPTED, ROLLED_BACK = admin_pb.RECOMPILE_STAGE_ADOPTED, admin_pb.RECOMPILE_STAGE_ROLLED_BACK
NOISE = {"canary_max_slowdown": 20.0}
"""Step times of a tiny model on a busy machine say little."""


@pytest.fixture
def home(tmp_path: Path, tiny_package: Path) -> Path:
    return new_home(tmp_path / "home", tiny_package)


@contextlib.contextmanager
def two_workers(home: Path, redis_url: str, **settings: Any) -> Iterator[tuple[Fleet, Any]]:
    """A fleet with two decode workers that run version 1, each with a cache of its own."""
    with (
        fleet(home, redis_url, **settings) as graphs,
        graphs.decode_worker(cache_dir=home / "one") as one,
        graphs.decode_worker(cache_dir=home / "two") as two,
    ):
        runs(one, 1)
        runs(two, 1)
        yield graphs, (one, two)


def tried(worker: DecodeWorker) -> bool:
    return "trial graph loaded" in worker.log.read_text()


def stages(events: list[Any]) -> list[int]:
    """Each stage once, in order."""
    return list(dict.fromkeys(event.stage for event in events))


def test_a_good_version_is_tried_by_one_worker_and_promoted(home: Path, redis_url: str) -> None:
    settings = {**NOISE, "canary_steps": 20, "canary_live_s": 60.0}
    with two_workers(home, redis_url, **settings) as (graphs, (one, two)):
        # only live steps can end the canary in time, so both need some
        with traffic(one), traffic(two):
            events = graphs.recompile()
        assert stages(events)[-3:] == [PUBLISHED, CANARY, ADOPTED]
        trial = [event.canary for event in events if event.stage == CANARY][-1]
        assert (trial.steps, trial.steps_done >= 20) == (20, True)
        assert trial.max_relative_difference == 0.0, "the same code on the same inputs"
        assert trial.time_ratio > 0
        assert (events[-1].adopted, events[-1].workers) == (2, 2)
        assert sorted([tried(one), tried(two)]) == [False, True]
        chosen = one if tried(one) else two
        assert trial.worker_id == chosen.status().worker_id
        assert (version(one), version(two)) == (2, 2)
        assert "agreed with version 1" in graphs.reason(2)


@pytest.mark.parametrize(
    ("fault", "settings", "said"),
    [
        ("slow", {"canary_max_slowdown": 2.0}, "times as long as version 1"),
        ("wrong", NOISE, "differs from version 1"),
    ],
)
def test_a_bad_version_is_rolled_back_while_requests_go_on(
    home: Path,
    redis_url: str,
    tiny_package: Path,
    fault: str,
    settings: dict[str, float],
    said: str,
) -> None:
    with two_workers(home, redis_url, canary_steps=12, **settings) as (graphs, workers):
        if fault == "slow":
            slow(tiny_package, graphs.package, milliseconds=5)
        else:
            wrong(tiny_package, graphs.package, was=1e-5, shall_be=1.0)
        with traffic(workers[0]), traffic(workers[1]):
            events = graphs.recompile()
            assert stages(events)[-2:] == [CANARY, ROLLED_BACK]
            assert said in events[-1].detail
            assert graphs.states() == {2: "quarantined", 1: "serving"}
            key = graphs.key()
            for worker, cache in zip(workers, ("one", "two"), strict=True):
                assert (version(worker), worker.status().restarts) == (1, 0)
                eventually(lambda cache=cache: DiskStore(home / cache).versions(key) == [1])
            assert sum(map(tried, workers)) == 1
            # requests try this one too: without any it would wait for them
            assert graphs.cli("recompile", key).returncode == 1


def test_without_traffic_steps_are_made_up(home: Path, redis_url: str) -> None:
    settings = {**NOISE, "canary_steps": 10, "canary_live_s": 0.3}
    with fleet(home, redis_url, **settings) as graphs, graphs.decode_worker() as worker:
        runs(worker, 1)
        before = worker.status()
        events = graphs.recompile()
        assert stages(events)[-2:] == [CANARY, ADOPTED]
        after = worker.status()
        assert (after.graph_steps, after.eager_steps) == (before.graph_steps, before.eager_steps)
        runs(worker, 2)


def test_a_candidate_that_crashes_takes_down_one_worker(
    home: Path, redis_url: str, tiny_package: Path
) -> None:
    settings = {**NOISE, "canary_live_s": 0.0}
    with two_workers(home, redis_url, **settings) as (graphs, workers):
        expected = ask(workers[0])
        crashing(tiny_package, graphs.package)
        events = graphs.recompile()
        assert events[-1].stage == ROLLED_BACK
        assert "SIGSEGV" in events[-1].detail
        for worker in workers:
            runs(worker, 1)
            eventually(worker.is_ready)
            assert ask(worker) == expected
        assert sum(worker.status().restarts for worker in workers) == 1
        assert graphs.states() == {2: "quarantined", 1: "serving"}


def test_another_worker_takes_over_from_a_dead_canary(home: Path, redis_url: str) -> None:
    settings = {**NOISE, "canary_live_s": 3.0, "canary_steps": 5}
    with two_workers(home, redis_url, **settings) as (graphs, workers):
        events: list[Any] = []
        following = threading.Thread(target=lambda: events.extend(graphs.recompile()))
        following.start()
        eventually(lambda: any(map(tried, workers)))
        [dead] = [worker for worker in workers if tried(worker)]
        [left] = [worker for worker in workers if worker is not dead]
        dead.kill()
        following.join(60)
        assert events[-1].stage == ADOPTED
        assert tried(left)
        assert version(left) == 2
        assert len({event.canary.worker_id for event in events if event.stage == CANARY}) == 2


def test_nobody_to_try_it_promotes_what_is_verified(home: Path, redis_url: str) -> None:
    with fleet(home, redis_url) as graphs:
        with graphs.decode_worker() as worker:
            runs(worker, 1)
        events = graphs.recompile()
        assert stages(events)[-2:] == [PUBLISHED, ADOPTED]
        assert graphs.states() == {2: "serving", 1: "previous"}
        assert "no worker was there" in graphs.reason(2)


def test_a_candidate_outlives_its_compile_worker(home: Path, redis_url: str) -> None:
    settings = {**NOISE, "canary_live_s": 3.0, "canary_steps": 5}
    with contextlib.ExitStack() as stack:
        with fleet(home, redis_url, **settings) as graphs:
            worker = stack.enter_context(graphs.decode_worker())
            runs(worker, 1)
            threading.Thread(target=swallow, args=(graphs,)).start()
            eventually(lambda: tried(worker))
            graphs.compiler.kill()
        assert version(worker) == 1
        with fleet(home, redis_url, **settings):
            runs(worker, 2)


def swallow(graphs: Fleet) -> None:
    """A recompile whose compile worker goes away."""
    with contextlib.suppress(Exception):
        graphs.recompile()
