"""Fixtures that several folders of tests use, and what holds for all processes of a run."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from precast.system.redis_server import RedisServer, start_redis
from tests.support.capture import HOME


def pytest_configure() -> None:
    """Let modules be compiled once for the whole run, where the environment forbids it.

    The tests start some hundred interpreters, most of which import torch: compiling its sources
    each time takes longer than the tests. The trees stay free of it, as the environment asks.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(HOME / "cache" / "bytecode")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)`` is a path at which ``make(path)`` has put something, in one worker of
    the run for all of them."""
    of_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_run = of_run.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with (of_run / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # others may need it about when the first one does
            if not (of_run / name).exists():
                make(of_run / f"{name}.part")
                (of_run / f"{name}.part").rename(of_run / name)
        return of_run / name

    return made


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real, empty Redis of this test's own."""
    with start_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture(autouse=True)
def _same_cpus() -> Iterator[None]:
    """A test that pins this process to a core, and leaves it there, fails: later tests, and what
    they start, would have that core only."""
    before = os.sched_getaffinity(0)
    yield
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before, "this test has left its process pinned"
