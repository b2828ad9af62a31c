"""Graphs reach a decode worker while it serves: captured, fetched, replaced, cached, damaged."""

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.command import precast
from tests.support.compile_worker import WorkerProcess, compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.graph_fleet import ask, traffic, version

MODEL = "tiny"
CAPTURE_S = 240
FRESH = ("/usr/bin/env",)
"""In front of a worker that is to import in its own environment, and not be a fork."""
TOOLS = ("g++", "gcc", "cc", "c++", "clang", "clang++", "ld", "as", "make", "ninja", "cmake")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def compiler(tiny_home: Path, tiny_redis: str) -> Iterator[WorkerProcess]:
    with compile_worker(tiny_home, tiny_redis, canary_max_slowdown=20.0) as running:
        yield running


@pytest.fixture
def no_compiler(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose compilers only write down that they were called."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for tool in TOOLS:
        path = folder / tool
        path.write_text(f'#!/bin/sh\necho "{tool} $*" >> {calls}\nexit 1\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "sh").symlink_to("/bin/sh")
    yield {"PATH": str(folder)}
    assert not calls.exists(), calls.read_text()


def test_eager_at_first_then_a_graph_then_its_next_version(
    tiny_home: Path, tiny_redis: str, compiler: WorkerProcess, no_compiler: dict[str, str]
) -> None:
    with decode_worker(
        tiny_home, tiny_redis, MODEL, batch_sizes="1", environment=no_compiler, prefix=FRESH
    ) as worker:
        eager = ask(worker)
        assert worker.status().eager_steps > 0
        eventually(lambda: version(worker) == 1, CAPTURE_S)
        before = worker.status()
        assert ask(worker) == eager
        assert worker.status().graph_steps > before.graph_steps
        assert worker.status().eager_steps == before.eager_steps

        stages = recompile_under_traffic(worker, compiler, eager)
        assert admin_pb.RECOMPILE_STAGE_PUBLISHED in [s.stage for s in stages]
        last = stages[-1]
        assert (last.stage, last.adopted, last.workers, last.version) == (
            admin_pb.RECOMPILE_STAGE_ADOPTED,
            1,
            1,
            2,
        )
        assert version(worker) == 2
        assert ask(worker) == eager


def recompile_under_traffic(
    worker: DecodeWorker, compiler: WorkerProcess, expected: list[int]
) -> list[Any]:
    """The stages of a recompile; requests run all the while and must not notice."""
    with traffic(worker) as answers, grpc.insecure_channel(compiler.address) as channel:
        stub = AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        request = admin_pb.RecompileRequest(model=MODEL, adoption_deadline_s=60)
        stages = list(stub.Recompile(request, timeout=CAPTURE_S))
    assert answers[0] == expected
    return stages


def test_a_warm_cache_needs_no_compile_worker(
    tiny_home: Path, tiny_redis: str, no_compiler: dict[str, str]
) -> None:
    with decode_worker(
        tiny_home,
        tiny_redis,
        MODEL,
        batch_sizes="1",
        environment=no_compiler,
        wait_for_graphs=True,
        compile_address="127.0.0.1:1",
    ) as worker:
        assert version(worker) == 2
        ask(worker)
        assert worker.status().eager_steps == 0


def test_imported_graphs_need_no_compile_worker(
    tiny_home: Path, tiny_redis: str, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    """Out of the store as a file, into the cache of a worker that has never seen a compile
    worker."""
    bundle, apart = tmp_path / "graphs.tar", tmp_path / "apart"
    exported = precast("graphs", "export", bundle, "--model", MODEL, "--home", tiny_home)
    assert (exported.returncode, exported.stderr) == (0, "graphs written: 1\n")
    refused = precast("graphs", "import", bundle, "--cache", "--home", apart)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "not trusted" in refused.stderr
    assert not list(apart.rglob("*.pt2"))
    shutil.copytree(tiny_home / "keys" / "trusted", apart / "keys" / "trusted")
    imported = precast("graphs", "import", bundle, "--cache", "--home", apart)
    assert (imported.returncode, imported.stdout) == (0, "graphs imported: 1\n")
    with decode_worker(
        apart,
        tiny_redis,
        MODEL,
        models_dir=tiny_home / "models",
        batch_sizes="1",
        environment=no_compiler,
        wait_for_graphs=True,
        compile_address="127.0.0.1:1",
    ) as worker:
        assert version(worker) == 2
        ask(worker)
        status = worker.status()
        assert (status.eager_steps, status.graph_steps > 0) == (0, True)


@contextmanager
def other_bytes(*paths: Path) -> Iterator[None]:
    """Cuts files in place, and makes them what they were at the end."""
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.chmod(0o600)
        os.truncate(path, len(content) // 8)
    yield
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def test_files_that_are_cut_under_load_hurt_nobody(tiny_home: Path, tiny_redis: str) -> None:
    """Neither weights nor graphs are mapped from files while ranks serve. Ranks that are started
    again load the graphs that were verified, and wait for the weights without blaming a graph."""
    with decode_worker(
        tiny_home,
        tiny_redis,
        MODEL,
        batch_sizes="1",
        wait_for_graphs=True,
        compile_address="127.0.0.1:1",
    ) as worker:
        expected = ask(worker)
        weights = tiny_home / "models" / MODEL / "model.safetensors"
        graphs = list((tiny_home / "cache" / "graphs").rglob("graph.pt2"))
        with other_bytes(*graphs):
            with other_bytes(weights):
                assert ask(worker) == expected
                [rank] = worker.ranks()
                mapped = Path(f"/proc/{rank}/maps").read_text()
                assert str(tiny_home) not in mapped
                os.kill(rank, signal.SIGBUS)
                eventually(lambda: worker.status().restarts >= 2)
            eventually(worker.is_ready)
            eventually(lambda: version(worker) == 2)
            assert ask(worker) == expected
        said = worker.log.read_text()
        assert "graph crashed a rank" not in said
        assert "changed_files=['model.safetensors']" in said
        assert not list((tiny_home / "cache").rglob("reason.txt"))


def test_graphs_of_a_folder_that_is_only_read(tiny_home: Path, tiny_redis: str) -> None:
    """As shipped in an image."""
    cache = tiny_home / "cache"
    mount = ["mount", "--bind", "-o", "ro", str(cache), str(cache)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        with decode_worker(
            tiny_home,
            tiny_redis,
            MODEL,
            batch_sizes="1",
            wait_for_graphs=True,
            compile_address="127.0.0.1:1",
        ) as worker:
            assert version(worker) == 2
            ask(worker)
            assert worker.status().eager_steps == 0
            assert "graph cache can't be written" in worker.log.read_text()
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_graphs_come_back_after_a_rank_died(tiny_home: Path, tiny_redis: str) -> None:
    with decode_worker(
        tiny_home,
        tiny_redis,
        MODEL,
        batch_sizes="1",
        wait_for_graphs=True,
        compile_address="127.0.0.1:1",
    ) as worker:
        expected = ask(worker)
        os.kill(worker.ranks()[0], signal.SIGKILL)
        eventually(lambda: worker.status().restarts == 1 and worker.is_ready())
        eventually(lambda: version(worker) == 2)
        assert ask(worker) == expected
        assert worker.status().eager_steps == 0


def test_a_damaged_artifact_is_never_loaded(tiny_home: Path, tiny_redis: str) -> None:
    """Every cached version is damaged: the worker says so, stays up and serves eagerly."""
    damaged = list((tiny_home / "cache" / "graphs").rglob("graph.pt2"))
    assert damaged
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
    with decode_worker(
        tiny_home, tiny_redis, MODEL, batch_sizes="1", compile_address="127.0.0.1:1"
    ) as worker:
        assert ask(worker)
        status = worker.status()
        assert (status.state, list(status.graphs)) == (pb.WORKER_STATE_READY, [])
        assert "cached graph removed" in worker.log.read_text()
