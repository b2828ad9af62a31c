"""Fixtures of the integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.conftest import Once
from tests.support.capture import run_capture
from tests.support.decode_worker import decode_worker
from tests.support.models import write_model
from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def tiny_package(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real graph of the tiny model at batch size 1, captured once for all tests."""
    return once(
        "tiny.pt2", lambda path: capture_tiny(tmp_path_factory.mktemp("capture")).rename(path)
    )


def capture_tiny(home: Path) -> Path:
    write_model(home / "models" / "tiny")
    with decode_worker(home, "redis://127.0.0.1:1/0", "tiny", batch_sizes="1") as worker:
        [wanted] = worker.stub().GetGraphSpecs(pb.GetGraphSpecsRequest(), timeout=30).wanted
    done = run_capture(wanted.factors, home)
    assert done.returncode == 0, done.stderr
    return home / "graph.pt2"


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the model ``tiny``, for all tests of a module."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / "tiny")
    return home


@pytest.fixture(scope="module")
def tiny_redis(tiny_home: Path) -> Iterator[str]:
    """URL of a real Redis for all tests of a module."""
    with start_redis(tiny_home / "redis") as server:
        yield server.url


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that this process and its children find in their environment."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
