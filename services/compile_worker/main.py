"""The compile worker's process."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from precast import log as logging
from precast.config.settings import CompileWorkerSettings
from precast.errors import CaptureFailed, ConfigError, RegistryUnavailable
from precast.fleet.heartbeat import Heartbeat
from precast.fleet.leases import CompileLease, Registry
from precast.fleet.queue.asks import Asks
from precast.fleet.queue.queue import CaptureQueue
from precast.graphs.artifacts.open_store import open_store
from precast.graphs.artifacts.trust import SigningKey, TrustFolder
from precast.graphs.capture import compiler
from precast.graphs.key import build_digest
from precast.rpc.address import advertised
from precast.rpc.server import Server, start_server
from precast.rpc.tls import Role, Tls
from precast.system.background import remove_idle_cgroups
from precast.system.process import available_cpus
from precast.system.scratch import sweep
from precast.system.stopping import run_until_stopped
from services.compile_worker.catalog.index import GraphIndex
from services.compile_worker.catalog.versions import Versions
from services.compile_worker.failures import Failures
from services.compile_worker.graphs import Graphs
from services.compile_worker.grpc_server import services
from services.compile_worker.maintenance.store import Upkeep
from services.compile_worker.metrics import Metrics
from services.compile_worker.rollout.canary import Canaries, CanaryPolicy
from services.compile_worker.sandbox.capture import CaptureLimits
from services.compile_worker.sandbox.client import ForkServer
from services.compile_worker.worker import MAX_ATTEMPTS, Worker

log = logging.get_logger(__name__)

STOP_GRACE_S: Final = 1.0
CAPTURES: Final = "captures"
"""Folder in ``home`` where captures work; what is left in it by the dead is removed."""
FAILURES: Final = "failures"
"""Folder in ``home`` where captures that failed leave what they were about."""
_COUNT_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class CaptureProgram:
    """What captures a graph, and what it adds to the graph's key."""

    module: str
    """See ``services.compile_worker.sandbox.server``."""
    arguments: Sequence[str]
    build_factors: Callable[[], Mapping[str, str]] = compiler.build_factors


def capture_program(settings: CompileWorkerSettings) -> CaptureProgram:
    kept = str(settings.build_dir)
    return CaptureProgram(module="precast.graphs.capture.entry", arguments=("--kept", kept))


def run(settings: CompileWorkerSettings, program: CaptureProgram | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ``ConfigError`` if it can't start."""
    logging.configure("compile-worker", settings)
    asyncio.run(_serve(settings, program or capture_program(settings)))
    return 0


async def _serve(settings: CompileWorkerSettings, program: CaptureProgram) -> None:
    started = time.monotonic()
    _check_cpus(settings)
    tls = Tls.load(settings.tls_dir, Role.COMPILE_WORKER)
    registry = Registry.connect(settings.redis_url)
    metrics = Metrics()
    graphs = await _open_graphs(settings, program, registry)
    capture_s = settings.capture_timeout_s * MAX_ATTEMPTS
    canaries = Canaries(
        versions=graphs.versions,
        registry=registry,
        policy=CanaryPolicy(
            steps=settings.canary_steps,
            live_s=settings.canary_live_s,
            max_slowdown=settings.canary_max_slowdown,
        ),
    )
    upkeep = Upkeep(
        graphs=graphs,
        registry=registry,
        metrics=metrics,
        max_bytes=settings.store_max_mb << 20,
        scrub_interval_s=settings.scrub_interval_s,
    )
    offered = services(canaries, upkeep, capture_s)
    server = await start_server(settings.listen, offered, tls=tls)
    if settings.metrics_port:
        metrics.serve(settings.metrics_host, settings.metrics_port)
    log.info(
        "compile worker ready",
        port=server.port,
        graphs=len(graphs.index.records()),
        signer=graphs.signing().id,
        start_s=round(time.monotonic() - started, 2),
    )
    try:
        await _work_until_stopped(settings, program, canaries, upkeep, server)
    finally:
        await server.stop(STOP_GRACE_S)
        await registry.close()


def _check_cpus(settings: CompileWorkerSettings) -> None:
    missing = sorted(set(settings.capture_cpus) - set(available_cpus()))
    if missing:
        raise ConfigError(f"capture_cpus: {missing[0]} is not a CPU that this process may use")


async def _open_graphs(
    settings: CompileWorkerSettings, program: CaptureProgram, registry: Registry
) -> Graphs:
    """Keys, store, index and queue, cleaned of what a killed predecessor left."""
    signing = SigningKey(path=settings.signing_key, trusted_dir=settings.trusted_keys_dir)
    signing.now()
    trusted = TrustFolder(folder=settings.trusted_keys_dir)
    trusted.require_valid()
    try:
        build = dict(await asyncio.to_thread(program.build_factors))
    except CaptureFailed as error:
        raise ConfigError(str(error)) from None
    store = open_store(settings.store_dir, settings.store_url)
    await asyncio.to_thread(store.require_writable)
    index = GraphIndex(registry.redis)
    queue = CaptureQueue(registry.redis, build_digest(build), max_queued=settings.max_queued)
    graphs = Graphs(
        store=store,
        index=index,
        queue=queue,
        versions=Versions(store=store, index=index, trusted=trusted),
        signing=signing.now,
        build=build,
        isa_targets=tuple(settings.isa_targets),
        canary=settings.canary_steps > 0,
    )
    swept = await asyncio.to_thread(store.sweep) + sweep(settings.home / CAPTURES)
    if swept:
        log.warning("leftovers of killed processes removed", folders=swept)
    try:
        await index.reconcile()  # labels and failures that the store doesn't know
    except RegistryUnavailable as error:
        log.warning("starting without Redis", reason=str(error))
    await graphs.restore()
    return graphs


async def _work_until_stopped(
    settings: CompileWorkerSettings,
    program: CaptureProgram,
    canaries: Canaries,
    upkeep: Upkeep,
    server: Server,
) -> None:
    graphs, metrics = upkeep.graphs, upkeep.metrics
    worker_id = f"compile-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    remove_idle_cgroups()  # of a killed predecessor
    forks = ForkServer(
        program.module,
        program.arguments,
        idle=settings.capture_idle,
        cpus=settings.capture_cpus,
    )
    workers = [
        Worker(
            consumer=f"{worker_id}.{number}",
            graphs=graphs,
            queue=graphs.queue,
            asks=Asks(registry=upkeep.registry),
            server=forks,
            limits=CaptureLimits(
                timeout_s=settings.capture_timeout_s,
                memory_bytes=settings.capture_memory_mb << 20,
            ),
            scratch=settings.home / CAPTURES,
            failures=Failures(folder=settings.home / FAILURES),
            metrics=metrics,
        )
        for number in range(settings.parallel_captures)
    ]

    def lease() -> CompileLease:
        capturing = metrics.count("compile_worker_capturing_jobs")
        return CompileLease(
            worker_id=worker_id,
            address=advertised(settings.advertise, server.port),
            queued=max(metrics.count("compile_worker_active_jobs") - capturing, 0),
            capturing=capturing,
        )

    async with Heartbeat(upkeep.registry, lease):
        tasks = [asyncio.create_task(worker.run()) for worker in workers]
        tasks += [
            asyncio.create_task(graphs.index.run()),
            asyncio.create_task(graphs.versions.follow()),
            asyncio.create_task(canaries.run()),
            asyncio.create_task(upkeep.run()),
            asyncio.create_task(_count_jobs(graphs.queue, metrics)),
        ]
        try:
            await run_until_stopped(tasks)
        finally:
            await forks.stop()


async def _count_jobs(queue: CaptureQueue, metrics: Metrics) -> None:
    with suppress(RegistryUnavailable):
        await queue.forget_dead_consumers()
    while True:
        try:
            metrics.active_jobs.set(await queue.length())
        except RegistryUnavailable:
            pass  # the gauge keeps the last known count
        await asyncio.sleep(_COUNT_INTERVAL_S)
