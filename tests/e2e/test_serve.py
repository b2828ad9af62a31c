"""``precast serve`` on the demo model: completions, kills, captures, stop, second start."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from precast.graphs.artifacts.disk_store import TEMPORARY, DiskStore
from precast.graphs.artifacts.signing import TrustedKeys
from precast.models.importing.importer import import_model
from tests.support.http_load import check_outcomes
from tests.support.serve_stack import Serve, alive, poll, segments, serving

pytestmark = pytest.mark.timeout(600)
READY_DEADLINE_S = 120.0
CAPTURE_DEADLINE_S = 300.0
RECOVERY_DEADLINE_S = 60.0
FLAGS = ("--batch-sizes=1", "--prefill-buckets=", "--tp=2")


@pytest.fixture(scope="module")
def home(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home folder with the demo model in it; the tests fill it in order."""
    folder = tmp_path_factory.mktemp("home")
    import_model(str(demo_model), folder / "models", report=print)
    return folder


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[Serve]:
    with serving(home, *FLAGS) as running:
        running.wait_line("Precast serves smollm2-135m-instruct at http://", READY_DEADLINE_S)
        yield running


@pytest.fixture(scope="module")
def pids() -> set[int]:
    """Of every process that the stack has had."""
    return set()


def test_completes_as_soon_as_it_says_so(stack: Serve) -> None:
    assert "curl" in stack.wait_line("curl", 5)
    assert "Paris" in stack.complete()
    assert any("(flag)" in line and "batch_sizes" in line for line in stack.lines)


@pytest.mark.parametrize(
    "service", ["compile-worker", "decode-worker", "rank", "redis-server", "gateway"]
)
def test_recovers_from_a_kill_while_requests_run(
    stack: Serve, pids: set[int], service: str
) -> None:
    """The compile worker is killed in the middle of a capture."""
    pids.update(process.pid for process in stack.descendants())
    if service == "compile-worker":
        captures = stack.home / "captures"
        poll(lambda: captures.is_dir() and any(captures.iterdir()), 60, "a capture runs")
    killed = stack.service(service)
    with stack.load(max_tokens=8) as load:
        poll(lambda: load.good() >= 3, RECOVERY_DEADLINE_S, "requests run")
        os.kill(killed.pid, signal.SIGKILL)
        poll(lambda: not alive(killed), 20, f"{service} is dead")

        def restarted() -> bool:
            try:
                return stack.service(service).pid != killed.pid
            except (AssertionError, psutil.NoSuchProcess):
                return False

        poll(restarted, RECOVERY_DEADLINE_S, f"{service} is restarted")
        before = load.good()
        poll(lambda: load.good() >= before + 3, RECOVERY_DEADLINE_S, "requests finish again")
    check_outcomes(load.outcomes, may_lose=service == "gateway")
    if service in ("compile-worker", "redis-server"):
        assert all(outcome.finished for outcome in load.outcomes)
    assert "Paris" in stack.complete()


def test_captures_while_serving_and_replays(stack: Serve) -> None:
    stack.wait_line("captures 1 of 1", CAPTURE_DEADLINE_S)
    assert "Paris" in stack.complete()


def test_stops_everything(stack: Serve, pids: set[int]) -> None:
    before = stack.descendants()
    pids.update(process.pid for process in before)
    begun = time.monotonic()
    assert stack.stop(signal.SIGINT) == 0
    assert time.monotonic() - begun < 40
    poll(lambda: not any(map(alive, before)), 60, "everything has ended")
    ours = set(map(str, pids))
    assert not [name for name in segments() if ours & set(name.split("-"))]


def test_no_artifact_is_half_written(home: Path, stack: Serve) -> None:
    """What the killed processes were writing is whole or gone; the signatures hold."""
    assert stack.process.poll() is not None
    trusted = TrustedKeys.load(home / "keys" / "trusted")
    for store in (DiskStore(home / "store"), DiskStore(home / "cache" / "graphs")):
        keys = store.published_keys()
        assert len(keys) == 2, "one graph for each rank: their shards differ"
        for key in keys:
            artifact = store.open(key)  # compares size and digest
            trusted.verify(artifact.manifest_bytes, artifact.signature)
            assert store.versions(key) == [1]
    assert list((home / "captures").iterdir()) == []
    assert list((home / "store" / TEMPORARY).iterdir()) == []


def test_second_start_is_quick_and_needs_no_capture(home: Path, stack: Serve) -> None:
    assert stack.process.poll() is not None
    begun = time.monotonic()
    with serving(home, *FLAGS) as again:
        again.wait_line("Precast serves", READY_DEADLINE_S)
        again.wait_line("captures 1 of 1", READY_DEADLINE_S)
        assert "Paris" in again.complete()
        assert time.monotonic() - begun < 60
        assert again.stop() == 0


def test_streams_end_whole_when_serve_itself_is_killed(home: Path, stack: Serve) -> None:
    """Every child drains: the gateway, the worker under it, and the ranks under that."""
    assert stack.process.poll() is not None
    with serving(home, *FLAGS) as again:
        again.wait_line("Precast serves", READY_DEADLINE_S)
        started = again.descendants()
        with again.load(max_tokens=48) as load:
            poll(lambda: load.good() >= 3, READY_DEADLINE_S, "requests run")
            again.process.kill()
            load.stop()
        check_outcomes(load.outcomes)
        begun = [outcome for outcome in load.outcomes if outcome.text]  # others were refused
        assert len(begun) >= 3
        assert all(outcome.finished for outcome in begun)
        poll(lambda: not any(map(alive, started)), 60, "nothing is left")
