"""Graphs for several instruction sets: real captures, on a CPU made to look like a lesser one.

``PRECAST_NATIVE_ISA`` chooses what the native kernels run with, and so which targets a process
takes its CPU for.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.factors import ISA_LEVELS
from precast.graphs.targets import lesser, runs
from precast.ops.native import native_isa
from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.compile_worker import compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.forked import ISA
from tests.support.graph_fleet import Fleet, ask

MODEL = "tiny"
CHOSEN, OWN = os.environ.get(ISA), native_isa()
BELOW = {"amx": "avx2", "avx512": "avx2", "avxvnni": "scalar", "avx2": "scalar"}[OWN]
"""Two levels that this machine runs, whichever it has."""
LESSER = {ISA: BELOW}
LOW, HIGH = ISA_LEVELS[BELOW], ISA_LEVELS[OWN]
V3, V4 = "x86-64-v3", "x86-64-v4"
pytestmark = pytest.mark.timeout(400)


def isa_of(fleet: Fleet, worker: DecodeWorker) -> str:
    """Target of the loaded graph, as the store knows it; "": none is loaded."""
    graphs = worker.status().graphs
    store = DiskStore(fleet.home / "store")
    return store.open(graphs[0].keys[0]).manifest.factors["isa"] if graphs else ""


def wanted_isa(worker: DecodeWorker) -> str:
    request = pb.GetGraphSpecsRequest(num_tokens=1)
    return str(worker.stub().GetGraphSpecs(request, timeout=30).wanted[0].factors["isa"])


def start(tiny_home: Path, tiny_redis: str, name: str, **settings: Any) -> Any:
    return decode_worker(
        tiny_home, tiny_redis, MODEL, batch_sizes="1", cache_dir=tiny_home / name, **settings
    )


def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test run has, be it that no set is chosen."""
    monkeypatch.delenv(ISA) if CHOSEN is None else monkeypatch.setenv(ISA, CHOSEN)


def test_levels_are_in_order() -> None:
    assert lesser(V4) == [V3, "x86-64-v2"]
    assert lesser("x86-64-v2") == lesser("armv9") == lesser("") == []
    assert [runs(V3, isa) for isa in ("x86-64-v2", V3, V4, "armv9")] == [True, True, False, False]
    assert runs("armv9", "armv9")
    assert not runs("", V3)


def test_each_cpu_gets_its_own_level_and_a_lesser_one_meanwhile(
    tiny_home: Path, tiny_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile worker on a lesser CPU builds both: what it can't run is tried by the first worker
    that can, beside the lesser graph, before it serves."""
    only = {"isa_targets": [LOW], "canary_steps": 0}
    monkeypatch.setenv(ISA, BELOW)
    with compile_worker(tiny_home, tiny_redis, **only) as compiler:
        fleet = Fleet(home=tiny_home, redis_url=tiny_redis, compiler=compiler)
        with start(tiny_home, tiny_redis, "small", environment=LESSER) as small:
            assert wanted_isa(small) == LOW
            eventually(lambda: isa_of(fleet, small) == LOW, 120)
            tokens = ask(small)
        own(monkeypatch)
        with start(tiny_home, tiny_redis, "large") as large:
            assert wanted_isa(large) == HIGH
            eventually(lambda: isa_of(fleet, large) == LOW, 30)
            assert ask(large) == tokens
            assert f"this compile worker builds for {LOW}" in large.log.read_text()
    monkeypatch.setenv(ISA, BELOW)
    with compile_worker(
        tiny_home, tiny_redis, canary_live_s=0.0, canary_max_slowdown=20.0
    ) as compiler:
        fleet = Fleet(home=tiny_home, redis_url=tiny_redis, compiler=compiler)
        own(monkeypatch)
        with start(tiny_home, tiny_redis, "small", environment=LESSER) as small:
            eventually(lambda: isa_of(fleet, small) == LOW, 30)
            with start(tiny_home, tiny_redis, "large") as large:
                eventually(lambda: large.status().graphs, 30)
                assert isa_of(fleet, large) == LOW, "out of its cache"
                eventually(lambda: isa_of(fleet, large) == HIGH, 120)
                assert "trial graph loaded" in large.log.read_text()
                assert ask(large) == ask(small) == tokens
                assert isa_of(fleet, small) == LOW
                [manifest] = [
                    artifact.manifest
                    for key in DiskStore(tiny_home / "store").published_keys()
                    if (artifact := DiskStore(tiny_home / "store").open(key))
                    and artifact.manifest.factors["isa"] == HIGH
                ]
                assert not manifest.verified
                assert "trial graph" not in small.log.read_text()
        # what is its own comes first from now on
        with start(tiny_home, tiny_redis, "large") as large:
            eventually(lambda: isa_of(fleet, large), 30)
            assert isa_of(fleet, large) == HIGH
