"""``precast serve`` on the demo model: completions, kills, captures, stop, second start."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from precast.models.importer import import_model
from tests.support.serve_stack import Serve, poll, segments, serving

pytestmark = pytest.mark.timeout(600)
READY_DEADLINE_S = 120.0
CAPTURE_DEADLINE_S = 300.0
RECOVERY_DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def home(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home folder with the demo model in it; the tests fill it in order."""
    folder = tmp_path_factory.mktemp("home")
    import_model(str(demo_model), folder / "models", report=print)
    return folder


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[Serve]:
    with serving(home, "--batch-sizes=1") as running:
        running.wait_line("Precast serves smollm2-135m-instruct at http://", READY_DEADLINE_S)
        yield running


def test_completes_as_soon_as_it_says_so(stack: Serve) -> None:
    assert "curl" in stack.wait_line("curl", 5)
    assert "Paris" in stack.complete()
    assert any("(flag)" in line and "batch_sizes" in line for line in stack.lines)


@pytest.mark.parametrize("service", ["redis-server", "gateway", "decode-worker", "compile-worker"])
def test_recovers_from_a_kill(stack: Serve, service: str) -> None:
    killed = stack.service(service)
    os.kill(killed.pid, signal.SIGKILL)

    def back() -> bool:
        try:
            restarted = stack.service(service).pid != killed.pid
            return restarted and "Paris" in stack.complete()
        except (AssertionError, psutil.NoSuchProcess, httpx.HTTPError):
            return False

    poll(back, RECOVERY_DEADLINE_S, f"completions after {service} was killed")


def test_captures_while_serving_and_replays(stack: Serve) -> None:
    stack.wait_line("captures 1 of 1", CAPTURE_DEADLINE_S)
    assert "Paris" in stack.complete()


def test_stops_everything(stack: Serve) -> None:
    before = stack.descendants()
    begun = time.monotonic()
    assert stack.stop(signal.SIGINT) == 0
    assert time.monotonic() - begun < 20
    assert not [process for process in before if process.is_running()]
    ours = {str(process.pid) for process in before}
    assert not [name for name in segments() if ours & set(name.split("-"))]


def test_second_start_is_quick_and_needs_no_capture(home: Path, stack: Serve) -> None:
    assert stack.process.poll() is not None
    begun = time.monotonic()
    with serving(home, "--batch-sizes=1") as again:
        again.wait_line("Precast serves", READY_DEADLINE_S)
        again.wait_line("captures 1 of 1", READY_DEADLINE_S)
        assert "Paris" in again.complete()
        assert time.monotonic() - begun < 60
        assert again.stop() == 0
