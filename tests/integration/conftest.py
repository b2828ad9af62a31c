"""Fixtures of the integration tests."""

from pathlib import Path

import pytest

from precast.decode.v1 import decode_service_pb2 as pb
from tests.support.capture import run_capture
from tests.support.decode_worker import decode_worker
from tests.support.models import write_model


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real graph of the tiny model at batch size 1, captured once for all tests."""
    home = tmp_path_factory.mktemp("capture")
    write_model(home / "models" / "tiny")
    with decode_worker(home, "redis://127.0.0.1:1/0", "tiny", batch_sizes="1") as worker:
        [wanted] = worker.stub().GetGraphSpecs(pb.GetGraphSpecsRequest(), timeout=10).wanted
    done = run_capture(wanted.factors, home)
    assert done.returncode == 0, done.stderr
    return home / "graph.pt2"
