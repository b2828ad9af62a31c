"""A compile worker over gRPC: requests, captures, fetches, recompiles, errors."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from safetensors.torch import load_file

from precast.errors import ArtifactRejected
from precast.fleet.leases import DecodeLease, LoadedGraphRecord, Registry
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import QUARANTINE, DiskStore
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import TrustedKeys
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from tests.support.command import precast
from tests.support.compile_worker import (
    FACTORS,
    Client,
    WorkerProcess,
    compile_worker,
    connect,
    has_captures,
    starts,
    wait_until,
)
from tests.support.ports import free_port

PUBLISHED, FAILED = pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED


def spec(how: str = "llama", num_tokens: int = 1) -> dict[str, str]:
    return {**FACTORS, "architecture": how, "num_tokens": str(num_tokens)}


def cache_of(tmp_path: Path, worker: WorkerProcess) -> GraphCache:
    return GraphCache(tmp_path / "cache", TrustedKeys.load(worker.home / "keys" / "trusted"))


async def published(client: Client, *specs: dict[str, str]) -> list[str]:
    """Ask for graphs and wait for them; their keys."""
    keys = [state.key for state in await client.request(*specs)]
    states = await client.until(keys, PUBLISHED, FAILED)
    assert {state.phase for state in states.values()} == {PUBLISHED}, states
    return keys


async def test_captures_each_graph_once_and_hands_it_out(tmp_path: Path, redis_url: str) -> None:
    specs = [spec(num_tokens=size) for size in (4, 1, 2)]
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            states = await client.request(*specs)
            again = await client.request(*specs)
            keys = [state.key for state in states]
            done = await client.until(keys, PUBLISHED)
            cache = cache_of(tmp_path, worker)
            fetched = await fetch_graph(client.graphs, cache, keys[0], spec=specs[0])
            listed = await client.graphs.ListGraphs(pb.ListGraphsRequest(model="tiny"), timeout=30)
            none = await client.graphs.ListGraphs(pb.ListGraphsRequest(model="other"), timeout=30)
            one = await client.graphs.ListGraphs(pb.ListGraphsRequest(num_tokens=2), timeout=30)
            await asyncio.to_thread(wait_until, lambda: not has_captures(worker.home))
    assert [state.key for state in again] == keys
    assert {state.version for state in done.values()} == {1}
    assert [size for _, _, size in starts(ledger)] == ["1", "2", "4"]
    assert fetched.manifest.key == keys[0]
    assert fetched.manifest.models == ("tiny",)
    assert cache.find(specs[0]) == fetched
    assert cache.find(specs[1]) is None
    assert {graph.key for graph in listed.graphs} == set(keys)
    assert list(none.graphs) == []
    assert [graph.key for graph in one.graphs] == [keys[2]]


async def test_what_traffic_misses_is_captured_first(tmp_path: Path, redis_url: str) -> None:
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    (ledger / "closed").touch()
    missed = {1: 0, 2: 5, 4: 0, 8: 900, 16: 5}
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            await client.request(spec(num_tokens=32))
            await asyncio.to_thread(wait_until, lambda: starts(ledger))
            await client.request(*[spec(num_tokens=size) for size in missed])
            specs = [spec(num_tokens=size) for size in missed]
            states = await client.request(*specs, urgencies=[*missed.values()])
            (ledger / "open").touch()
            await client.until([state.key for state in states], PUBLISHED)
    assert [int(size) for _, _, size in starts(ledger)] == [32, 8, 2, 16, 1, 4]


async def test_limits_that_cannot_be_kept_stop_a_start(tmp_path: Path, redis_url: str) -> None:
    with (
        pytest.raises(AssertionError, match="capture_cpus: 4000 is not a CPU"),
        compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger", capture_cpus="4000"),
    ):
        pass


async def test_restarted_worker_captures_nothing_twice(tmp_path: Path, redis_url: str) -> None:
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            keys = await published(client, spec())
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            assert await published(client, spec()) == keys
    assert len(starts(ledger)) == 1


ERRORS: list[tuple[str, Any, str, str]] = [
    (
        "RequestGraphs",
        pb.RequestGraphsRequest(specs=[pb.GraphSpec(factors={**FACTORS, "num_tokens": "0"})]),
        "INVALID_ARGUMENT",
        "num_tokens",
    ),
    (
        "RequestGraphs",
        pb.RequestGraphsRequest(specs=[pb.GraphSpec(factors={"host": "a"})]),
        "INVALID_ARGUMENT",
        "host",
    ),
    (
        "RequestGraphs",
        pb.RequestGraphsRequest(specs=[pb.GraphSpec()] * 1025),
        "INVALID_ARGUMENT",
        "1025 specs",
    ),
    (
        "RequestGraphs",
        pb.RequestGraphsRequest(model="m" * 200),
        "INVALID_ARGUMENT",
        "model label",
    ),
    ("FetchGraph", pb.FetchGraphRequest(key="0" * 32), "NOT_FOUND", "0" * 32),
    ("FetchGraph", pb.FetchGraphRequest(key="../../keys"), "INVALID_ARGUMENT", "no graph key"),
    ("ExplainGraph", pb.ExplainGraphRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("ReportCrash", pb.ReportCrashRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("ReportCanary", pb.ReportCanaryRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("ListVersions", admin_pb.ListVersionsRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("RollBackGraph", admin_pb.RollBackGraphRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("PinVersion", admin_pb.PinVersionRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("UnpinVersion", admin_pb.UnpinVersionRequest(key="x"), "INVALID_ARGUMENT", "no graph key"),
    ("Recompile", admin_pb.RecompileRequest(keys=["x"]), "INVALID_ARGUMENT", "no graph key"),
    ("FetchGraph", pb.FetchGraphRequest(key="0" * 32, version=2**64 - 1), "NOT_FOUND", "0"),
    ("WatchGraphs", pb.WatchGraphsRequest(keys=["0" * 32]), "NOT_FOUND", "0" * 32),
    ("WatchGraphs", pb.WatchGraphsRequest(keys=["x"]), "INVALID_ARGUMENT", "'x'"),
    ("Recompile", admin_pb.RecompileRequest(), "INVALID_ARGUMENT", "recompile what"),
    ("Recompile", admin_pb.RecompileRequest(keys=["0" * 32]), "NOT_FOUND", "0" * 32),
    ("Recompile", admin_pb.RecompileRequest(model="none"), "NOT_FOUND", "no graph matches"),
    ("CancelJob", admin_pb.CancelJobRequest(job_id="none"), "NOT_FOUND", "'none'"),
]


async def test_bad_requests_get_their_status_and_the_service_stays_up(
    tmp_path: Path, redis_url: str
) -> None:
    with compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger") as worker:
        async with connect(worker) as client:
            for method, request, status, detail in ERRORS:
                stub = client.graphs if hasattr(client.graphs, method) else client.admin
                call = getattr(stub, method)(request, timeout=30)
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    if isinstance(call, grpc.aio.UnaryStreamCall):
                        await call.read()
                    else:
                        await call
                assert failure.value.code().name == status, method
                assert detail in str(failure.value.details())
            assert await published(client, spec())
        assert "Traceback" not in worker.log.read_text()


def kept_of_failure(worker: WorkerProcess, state: pb.GraphState) -> None:
    """Where a graph differs from eager is told, and the files to look at are there."""
    failure = state.failed_capture
    found = failure.mismatch
    assert (found.case, found.output, list(found.index)) == ("block edges", "logits", [1, 3])
    assert (found.expected, found.actual) == (1.0, 3.0)
    assert dict(found.differences) == {"keys of layer 0": 0.0, "logits": 2.0}
    assert list(found.context_lens) == [7, 32]
    folder = Path(failure.folder)
    assert folder.parent == worker.home / "failures"
    assert sorted(failure.files) == sorted(path.name for path in folder.iterdir())
    assert {"layer.kernels.cpp", "stderr.txt"} <= set(failure.files)
    assert json.loads((folder / "factors.json").read_text())["architecture"] == "differ"
    tensors = load_file(folder / "tensors.safetensors")
    assert tensors["actual"].tolist() == [1, 1, 1, 3, 1]
    assert tensors["context_lens"].tolist() == [7, 32]
    assert f"--out {folder}/again < {folder}/factors.json" in failure.command
    shown = precast("graphs", "show", state.key, "--address", worker.address).stdout
    said = " ".join(shown.split())
    for part in ("logits [1, 3], case block edges", "1.0, 3.0 (bound 1e-04)", "7, 32"):
        assert part in said


async def test_failed_captures_fail_alone(tmp_path: Path, redis_url: str) -> None:
    ways = {
        "hang": "longer than 4 s",
        "crash": "signal 11",
        "eat": "more than 300 MB",
        "exit": "no such operator",
        "refuse": "kv_heads is odd",
        "differ": "differs from eager",
    }
    ledger = tmp_path / "ledger"
    limits = {"capture_timeout_s": 4, "capture_memory_mb": 300}
    with compile_worker(tmp_path / "home", redis_url, ledger, **limits) as worker:
        async with connect(worker) as client:
            states = await client.request(*(spec(how) for how in ways), spec())
            keys = [state.key for state in states]
            done = await client.until(keys, PUBLISHED, FAILED, deadline_s=40)
            for key, reason in zip(keys, ways.values(), strict=False):
                assert done[key].phase == FAILED
                assert reason in done[key].error
            assert done[keys[-1]].phase == PUBLISHED
            kept_of_failure(worker, done[keys[list(ways).index("differ")]])
            crashed = done[keys[list(ways).index("crash")]].failed_capture
            assert not crashed.HasField("mismatch")
            assert {"factors.json", "stderr.txt"} <= set(crashed.files)
            # a further request, within the backoff, begins nothing
            again = await client.request(*(spec(how) for how in ways))
            assert {state.phase for state in again} == {FAILED}
            jobs = (await client.admin.ListJobs(admin_pb.ListJobsRequest(), timeout=30)).jobs
            assert sum(job.stage == admin_pb.RECOMPILE_STAGE_FAILED for job in jobs) == len(ways)
        assert len(starts(ledger)) == len(ways) + 1
        assert worker.process.poll() is None


async def test_recompile_starts_a_failed_capture_again(tmp_path: Path, redis_url: str) -> None:
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            [state] = await client.request(spec("exit"))
            await client.until([state.key], FAILED)
            request = admin_pb.RecompileRequest(keys=[state.key])
            stages = [step.stage async for step in client.admin.Recompile(request, timeout=20)]
            assert stages == [
                admin_pb.RECOMPILE_STAGE_QUEUED,
                admin_pb.RECOMPILE_STAGE_CAPTURING,
                admin_pb.RECOMPILE_STAGE_FAILED,
            ]
    assert len(starts(ledger)) == 2


def decode_lease(name: str, key: str, version: int) -> DecodeLease:
    return DecodeLease(
        worker_id=name,
        address="127.0.0.1:1",
        model="tiny",
        state="ready",
        max_batch_size=1,
        max_context_length=1,
        weight_dtype="fp32",
        quantization="int8",
        graphs=(LoadedGraphRecord(num_tokens=1, keys=(key,), versions=(version,)),),
    )


async def test_recompile_reports_every_stage_and_adoption(tmp_path: Path, redis_url: str) -> None:
    registry = Registry.connect(redis_url, lease_ttl_s=30)
    with compile_worker(
        tmp_path / "home", redis_url, tmp_path / "ledger", canary_steps=0
    ) as worker:
        async with connect(worker) as client:
            [key, other] = await published(client, spec(), spec(num_tokens=2))
            await registry.publish(decode_lease("one", key, 1))
            await registry.publish(decode_lease("two", key, 1))
            await registry.publish(decode_lease("elsewhere", other, 1))
            steps = []
            request = admin_pb.RecompileRequest(model="tiny", sizes=[1])
            async for step in client.admin.Recompile(request, timeout=30):
                steps.append(step)
                if step.stage == admin_pb.RECOMPILE_STAGE_ADOPTED:
                    name = ("one", "two", "")[step.adopted]
                    if name:
                        await registry.publish(decode_lease(name, key, step.version))
            cache = cache_of(tmp_path, worker)
            newest = await fetch_graph(client.graphs, cache, key, spec=spec())
    await registry.close()
    names = [
        admin_pb.RecompileStage.Name(step.stage).removeprefix("RECOMPILE_STAGE_") for step in steps
    ]
    stages = ["QUEUED", "CAPTURING", "CAPTURED", "VERIFIED", "PUBLISHED"]
    assert names == [*stages, "ADOPTED", "ADOPTED", "ADOPTED"]
    assert [(step.adopted, step.workers) for step in steps[5:]] == [(0, 2), (1, 2), (2, 2)]
    assert {(step.key, step.version, step.num_tokens) for step in steps} == {(key, 2, 1)}
    assert newest.manifest.version == 2


async def test_adoption_has_a_deadline(tmp_path: Path, redis_url: str) -> None:
    registry = Registry.connect(redis_url, lease_ttl_s=30)
    with compile_worker(
        tmp_path / "home", redis_url, tmp_path / "ledger", canary_steps=0
    ) as worker:
        async with connect(worker) as client:
            [key] = await published(client, spec())
            await registry.publish(decode_lease("stuck", key, 1))
            request = admin_pb.RecompileRequest(all=True, adoption_deadline_s=1)
            *_, last = [step async for step in client.admin.Recompile(request, timeout=20)]
    await registry.close()
    assert (last.adopted, last.workers, last.detail) == (0, 1, "not all within the deadline")


async def test_cancelled_capture_is_killed_and_not_begun_again(
    tmp_path: Path, redis_url: str
) -> None:
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            states = await client.request(spec("gated"), spec("gated", 2))
            await asyncio.to_thread(wait_until, lambda: starts(ledger))
            jobs = (await client.admin.ListJobs(admin_pb.ListJobsRequest(), timeout=30)).jobs
            for job in reversed(jobs):  # the queued one first
                request = admin_pb.CancelJobRequest(job_id=job.job_id)
                cancelled = (await client.admin.CancelJob(request, timeout=20)).job
                assert cancelled.stage == admin_pb.RECOMPILE_STAGE_CANCELLED
            [pid, *_] = starts(ledger)[0]
            await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{pid}").exists())
            again = await client.request(spec("gated"), spec("gated", 2))
            assert {state.phase for state in again} == {FAILED}
            assert {state.error for state in again} == {"capture was cancelled"}
            assert await published(client, spec()) != [states[0].key]
    assert len(starts(ledger)) == 2


async def test_damaged_artifact_is_refused_put_aside_and_captured_again(
    tmp_path: Path, redis_url: str
) -> None:
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            [key] = await published(client, spec())
            store = DiskStore(worker.home / "store")
            path = store.open(key).graph_path
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            cache = cache_of(tmp_path, worker)
            with pytest.raises(ArtifactRejected, match=r"digest.*put aside"):
                await fetch_graph(client.graphs, cache, key, spec=spec())

            def second() -> bool:
                return store.versions(key) == [2]

            await asyncio.to_thread(wait_until, second)
            fetched = await fetch_graph(client.graphs, cache, key, spec=spec())
            assert fetched.manifest.version == 2
            assert worker.process.poll() is None
    [aside] = (worker.home / "store" / QUARANTINE).iterdir()
    assert "digest" in (aside / "reason.txt").read_text()
    assert len(starts(ledger)) == 2


async def test_graph_that_could_not_be_run_serves_nobody_untried(
    tmp_path: Path, redis_url: str
) -> None:
    """It is captured once and waits, over a restart too; a hand may still decide."""
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    with compile_worker(home, redis_url, ledger, canary_steps=0) as worker:
        async with connect(worker) as client:
            [state] = await client.request(spec("foreign"))
            await asyncio.to_thread(wait_until, lambda: DiskStore(home / "store").published_keys())
            await waits_untried(client, state.key)
    for empty in (False, True):
        if empty:
            (home / "store" / state.key / "lifecycle.json").unlink()
            await flush(redis_url)
        with compile_worker(home, redis_url, ledger, canary_steps=0) as worker:
            async with connect(worker) as client:
                await waits_untried(client, state.key)
                if empty:
                    await client.admin.RollBackGraph(
                        admin_pb.RollBackGraphRequest(key=state.key, version=1), timeout=30
                    )
                    done = await client.until([state.key], PUBLISHED)
                    assert done[state.key].version == 1
    assert len(starts(ledger)) == 1


async def flush(redis_url: str) -> None:
    registry = Registry.connect(redis_url)
    await registry.redis.flushall()
    await registry.close()


async def waits_untried(client: Client, key: str) -> None:
    for _ in range(3):
        [state] = await client.request(spec("foreign"))
        assert (state.key, state.version) == (key, 0)
        if "waits for a worker of x86-64-v3" in state.error:
            break
        await asyncio.sleep(1)
    assert state.phase == pb.GRAPH_PHASE_CAPTURING
    assert "waits for a worker of x86-64-v3 to try it" in state.error
    for version in (0, 1):
        call: Any = client.graphs.FetchGraph(pb.FetchGraphRequest(key=key, version=version))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()


async def test_isa_that_is_not_a_target_is_refused(tmp_path: Path, redis_url: str) -> None:
    targets = {"isa_targets": ["x86-64-v2"]}
    with compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger", **targets) as worker:
        async with connect(worker) as client:
            [state] = await client.request(spec())
            assert state.phase == FAILED
            assert "x86-64-v3: this compile worker builds for x86-64-v2" in state.error
            [other] = await client.request({**spec(), "isa": "x86-64-v2"})
            await client.until([other.key], PUBLISHED)
            assert len(starts(tmp_path / "ledger")) == 1


@pytest.mark.parametrize("broken", ["store", "keys/signing.key"])
def test_start_that_can_not_work_ends_with_one_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / broken
    path.parent.mkdir(exist_ok=True)
    path.write_text("not what it should be")
    command = [Path(sys.executable).with_name("precast"), "compile-worker", "--home", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert str(path) in ended.stderr.splitlines()[-1]


async def test_lease_and_metrics(tmp_path: Path, redis_url: str) -> None:
    port = free_port()
    registry = Registry.connect(redis_url)
    with compile_worker(
        tmp_path / "home", redis_url, tmp_path / "ledger", metrics_port=port
    ) as worker:
        async with connect(worker) as client:
            await published(client, spec())
            [lease] = await registry.compile_workers()
            assert lease.address == worker.address

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                return str(answer.read().decode())

        expected = 'compile_worker_captures_total{outcome="published"} 1.0'
        await asyncio.to_thread(wait_until, lambda: expected in scrape())
        worker.process.terminate()
        assert worker.process.wait(10) == 0
        assert await registry.compile_workers() == [], "a worker that stops withdraws its lease"
    await registry.close()
