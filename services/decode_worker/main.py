"""The decode worker's process: the leader of a group of ranks."""

import asyncio
import gc
import os
import secrets
import socket
import time
from typing import Final

import uvloop

from precast import log as logging
from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError, ModelCorrupt
from precast.fleet.heartbeat import Heartbeat
from precast.fleet.leases import Registry
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.trust import TrustFolder
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.address import advertised
from precast.rpc.local_link import serving_locally
from precast.rpc.server import Server, start_server
from precast.rpc.tls import Role, Tls
from precast.system.shared_memory import sweep_segments
from precast.system.stopping import run_until_stopped
from precast.telemetry import open_tracer
from services.decode_worker import grpc_server
from services.decode_worker.constraints.checker import Setup
from services.decode_worker.constraints.compiler import ConstraintCompiler
from services.decode_worker.engine.engine import Engine
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sizing import Share, rank_inits, window_blocks
from services.decode_worker.graphs.autotune.loop import keep_tuning
from services.decode_worker.graphs.autotune.policy import AutotunePolicy, kept_sizes
from services.decode_worker.graphs.compiler_client import LOOK_S, CompilerClient
from services.decode_worker.graphs.loader import ArtifactLoader
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.model_files import digest_of_tokenizer, open_model
from services.decode_worker.ranks.group import FilesChanged, GroupFailed
from services.decode_worker.ranks.launcher import RankLauncher
from services.decode_worker.worker import Worker

log = logging.get_logger(__name__)

DRAIN_S: Final = 10.0
TRIALS: Final = ".candidates"
"""Folder in the cache for graphs that this worker tries before others do."""
_OPEN_AFTER_S: Final = 0.2
"""When the ranks have been told what to load: until they have, the leader has nothing to do."""
_WARM_S: Final = 5.0
"""After its start a worker has other things to do with its processors than to get ready for
constraints."""


def run(settings: DecodeWorkerSettings, launcher: RankLauncher, share: Share) -> int:
    """Serves until SIGTERM or SIGINT; the exit code. Raises PrecastError if it can't start."""
    logging.configure("decode-worker", settings)
    gc.freeze()  # a full collection would walk all that was imported: 0.1 s without a token
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, launcher, share))
    return 0


async def _serve(settings: DecodeWorkerSettings, launcher: RankLauncher, share: Share) -> None:
    started = time.monotonic()
    config, tokenizer = open_model(settings)
    if swept := sweep_segments():
        log.warning("shared memory of dead groups removed", segments=swept)
    metrics = Metrics()
    metrics.unsigned.set(settings.allow_unsigned_graphs)
    if settings.allow_unsigned_graphs:
        log.warning(
            "UNSIGNED GRAPHS ARE ALLOWED: whoever reaches the compile worker runs code here"
        )
    pace = Pace(settings.max_decode_gap_ms / 1e3)
    changed = asyncio.Event()
    graphs = GraphManager(settings.graph_sizes, changed.set)
    scheduler = Scheduler(
        blocks=share.kv_blocks,
        block_size=settings.block_size,
        max_batch_size=settings.max_batch_size,
        max_context_length=share.context,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk,
        pace=pace,
        graph_sizes=(lambda: graphs.layer_us) if settings.speculate else None,
        windows=window_blocks(settings, share),
    )
    constraints = ConstraintCompiler(
        lambda: Setup(
            tokenizer=tokenizer.to_str(),
            vocab_size=config.vocab_size,
            eos_token_ids=tuple(sorted(config.eos_token_ids)),
        )
    )
    engine = Engine(
        scheduler=scheduler,
        graphs=graphs,
        inits=lambda: rank_inits(settings, share),
        launcher=launcher,
        metrics=metrics,
        pace=pace,
        content=share.content,
        on_change=changed.set,
    )
    running = asyncio.create_task(engine.run(), name="engine")
    worker_id = f"decode-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    tracer = open_tracer(
        settings.otlp_endpoint, service="precast-decode-worker", instance=worker_id
    )
    worker = Worker(
        worker_id=worker_id,
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        scheduler=scheduler,
        engine=engine,
        graphs=graphs,
        max_context_length=share.context,
        constraints=constraints,
        tokenizer_digest=digest_of_tokenizer(settings),
        tracer=tracer,
        on_change=changed.set,
    )
    registry = Registry.connect(settings.redis_url)
    tls = Tls.load(settings.tls_dir, Role.DECODE_WORKER)
    server = await start_server(
        settings.listen, [grpc_server.service(worker)], serving=False, tls=tls
    )
    _watch(metrics, engine, scheduler)
    if settings.metrics_port:
        metrics.serve(settings.metrics_host, settings.metrics_port)
    address = advertised(settings.advertise, server.port)
    try:
        async with (
            serving_locally(
                worker_id, grpc_server.local_generate(worker), pb.GenerateRequest.FromString
            ),
            Heartbeat(registry, lambda: worker.lease(address)) as heartbeat,
        ):
            await run_until_stopped(
                [
                    running,
                    asyncio.create_task(
                        _get_graphs(worker_id, settings, engine, graphs, registry, tls)
                    ),
                    asyncio.create_task(
                        _follow_changes(worker, changed, server, heartbeat, started)
                    ),
                    asyncio.create_task(_adapt(settings, engine, graphs)),
                    asyncio.create_task(_open_constraints(engine, constraints)),
                ],
                before_stop=lambda: _drain(worker, heartbeat),
            )
    except FilesChanged as changed:  # another process serves what is there now
        raise ModelCorrupt(f"{settings.model}: {changed}") from None
    except GroupFailed as failure:  # of a group that never ran: a restart would not help
        raise ConfigError(str(failure)) from None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(0.5)
        await constraints.close()
        await registry.close()
        if tracer is not None:
            await tracer.close()


async def _get_graphs(
    worker_id: str,
    settings: DecodeWorkerSettings,
    engine: Engine,
    graphs: GraphManager,
    registry: Registry,
    tls: Tls | None,
) -> None:
    await engine.started.wait()
    trusted = TrustFolder(
        folder=settings.trusted_keys_dir, allow_unsigned=settings.allow_unsigned_graphs
    )
    while not (trusted.allow_unsigned or any(trusted.folder.glob("*.pub"))):  # noqa: ASYNC110
        # A compile worker that starts for the first time has yet to make its key.
        await asyncio.sleep(LOOK_S)
    trusted.require_valid()
    client = CompilerClient(
        worker_id=worker_id,
        model=settings.model,
        loader=ArtifactLoader(
            graphs=graphs,
            cache=GraphCache(settings.cache_dir, trusted),
            trial_cache=GraphCache(settings.cache_dir / TRIALS, trusted),
            on_due=engine.nudge,
        ),
        trusted=trusted,
        registry=registry,
        compile_address=settings.compile_address,
        tls=tls,
    )
    await client.run()


async def _adapt(settings: DecodeWorkerSettings, engine: Engine, graphs: GraphManager) -> None:
    if not settings.adapt_graphs:
        await asyncio.Event().wait()
    policy = AutotunePolicy(
        max_graphs=settings.max_graphs,
        keep=kept_sizes(settings.batch_sizes, settings.prefill_buckets),
    )
    await keep_tuning(policy, graphs, engine.counts.stats, settings.adapt_interval_s)


async def _open_constraints(engine: Engine, constraints: ConstraintCompiler) -> None:
    await asyncio.sleep(_OPEN_AFTER_S)
    await constraints.open()
    await engine.started.wait()
    await asyncio.sleep(_WARM_S)
    await constraints.warm()
    await asyncio.Event().wait()


async def _follow_changes(
    worker: Worker, changed: asyncio.Event, server: Server, heartbeat: Heartbeat, started: float
) -> None:
    """Keeps the health service, the lease and gateways in step with the worker, of whose state and
    graphs each change is told."""
    known, first = "starting", True
    while True:
        await changed.wait()
        changed.clear()
        heartbeat.publish_soon()
        if (state := worker.state) != known:
            known = state
            worker.tell_change()
            await server.set_serving(state == "ready")
            if state == "ready" and first:
                first = False
                start_s = round(time.monotonic() - started, 2)
                log.info("decode worker ready", port=server.port, start_s=start_s)


def _watch(metrics: Metrics, engine: Engine, scheduler: Scheduler) -> None:
    """Gauges are read when they are scraped."""
    metrics.running.set_function(lambda: engine.running)
    metrics.waiting.set_function(lambda: engine.waiting)
    metrics.kv_free.set_function(lambda: scheduler.blocks.free_blocks)
    if (windows := scheduler.windows) is not None:
        metrics.window_free.set_function(lambda: windows.free_blocks)


async def _drain(worker: Worker, heartbeat: Heartbeat) -> None:
    draining = asyncio.create_task(worker.drain(DRAIN_S, stopping=True))
    heartbeat.publish_soon()
    finished, aborted = await draining
    log.info("drained", finished=finished, aborted=aborted)
