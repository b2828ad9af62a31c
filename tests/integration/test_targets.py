"""Graphs for several instruction sets: real captures, on a CPU made to look like a lesser one.

``PRECAST_NATIVE_ISA`` chooses what the native kernels run with, and so which targets a process
takes its CPU for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.decode.v1 import decode_service_pb2 as pb
from precast.graphs.disk_store import DiskStore
from precast.graphs.targets import lesser, runs
from precast.ops.native import native_isa
from precast.redis_server import start_redis
from tests.support.compile_worker import compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.graph_fleet import Fleet, ask
from tests.support.models import write_model

MODEL = "tiny"
LESSER = {"PRECAST_NATIVE_ISA": "avx2"}
V3, V4 = "x86-64-v3", "x86-64-v4"
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(native_isa() != "avx512", reason="needs a CPU of two levels"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / MODEL)
    return home


@pytest.fixture(scope="module")
def redis_url(home: Path) -> Iterator[str]:
    with start_redis(home / "redis") as server:
        yield server.url


def isa_of(fleet: Fleet, worker: DecodeWorker) -> str:
    """Target of the loaded graph, as the store knows it; "": none is loaded."""
    graphs = worker.status().graphs
    store = DiskStore(fleet.home / "store")
    return store.open(graphs[0].keys[0]).manifest.factors["isa"] if graphs else ""


def wanted_isa(worker: DecodeWorker) -> str:
    request = pb.GetGraphSpecsRequest(batch_size=1)
    return str(worker.stub().GetGraphSpecs(request, timeout=10).wanted[0].factors["isa"])


def start(home: Path, redis_url: str, name: str, **settings: Any) -> Any:
    return decode_worker(home, redis_url, MODEL, batch_sizes="1", cache_dir=home / name, **settings)


def test_levels_are_in_order() -> None:
    assert lesser(V4) == [V3, "x86-64-v2"]
    assert lesser("x86-64-v2") == lesser("armv9") == lesser("") == []
    assert [runs(V3, isa) for isa in ("x86-64-v2", V3, V4, "armv9")] == [True, True, False, False]
    assert runs("armv9", "armv9")
    assert not runs("", V3)


def test_each_cpu_gets_its_own_level_and_a_lesser_one_meanwhile(
    home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile worker on a lesser CPU builds both: what it can't run is tried by the first worker
    that can, beside the lesser graph, before it serves."""
    only = {"isa_targets": [V3], "canary_steps": 0}
    monkeypatch.setenv("PRECAST_NATIVE_ISA", "avx2")
    with compile_worker(home, redis_url, **only) as compiler:
        fleet = Fleet(home=home, redis_url=redis_url, compiler=compiler)
        with start(home, redis_url, "small", environment=LESSER) as small:
            assert wanted_isa(small) == V3
            eventually(lambda: isa_of(fleet, small) == V3, 120)
            tokens = ask(small)
        monkeypatch.delenv("PRECAST_NATIVE_ISA")
        with start(home, redis_url, "large") as large:
            assert wanted_isa(large) == V4
            eventually(lambda: isa_of(fleet, large) == V3, 30)
            assert ask(large) == tokens
            assert "this compile worker builds for x86-64-v3" in large.log.read_text()
    monkeypatch.setenv("PRECAST_NATIVE_ISA", "avx2")
    with compile_worker(home, redis_url, canary_live_s=0.0, canary_max_slowdown=20.0) as compiler:
        fleet = Fleet(home=home, redis_url=redis_url, compiler=compiler)
        monkeypatch.delenv("PRECAST_NATIVE_ISA")
        with start(home, redis_url, "small", environment=LESSER) as small:
            eventually(lambda: isa_of(fleet, small) == V3, 30)
            with start(home, redis_url, "large") as large:
                eventually(lambda: large.status().graphs, 30)
                assert isa_of(fleet, large) == V3, "out of its cache"
                eventually(lambda: isa_of(fleet, large) == V4, 120)
                assert "canary loaded" in large.log.read_text()
                assert ask(large) == ask(small) == tokens
                assert isa_of(fleet, small) == V3
                [manifest] = [
                    artifact.manifest
                    for key in DiskStore(home / "store").published_keys()
                    if (artifact := DiskStore(home / "store").open(key))
                    and artifact.manifest.factors["isa"] == V4
                ]
                assert not manifest.verified
                assert "canary" not in small.log.read_text()
        # what is its own comes first from now on
        with start(home, redis_url, "large") as large:
            eventually(lambda: isa_of(fleet, large), 30)
            assert isa_of(fleet, large) == V4
