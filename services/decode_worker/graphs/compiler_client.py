"""Gets this worker its graphs: from its cache, then from a compile worker.

It asks for missing graphs every few seconds, and looks for another compile worker when one goes
away. No request ever waits for this. Before it loads anything from the cache, it asks a compile
worker within reach which versions serve: one may have been rolled back or quarantined while this
worker was down.
"""

import asyncio
import contextlib
import time
from typing import Any, Final

import grpc.aio

from precast.errors import (
    ArtifactRejected,
    CompilerUnavailable,
    NotFound,
    PrecastError,
)
from precast.fleet.leases import Registry
from precast.graphs.artifacts.condemned import Condemned
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.artifacts.trust import Trust
from precast.log import get_logger
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as pb_grpc
from precast.rpc.server import error_of, open_channel
from precast.rpc.tls import Tls
from precast.system.backoff import Backoff
from services.decode_worker.graphs.compiler_calls import (
    RPC_TIMEOUT_S,
    explain_missing,
    report_crash,
    report_trial,
)
from services.decode_worker.graphs.loader import ArtifactLoader, Spec, lesser_specs
from services.decode_worker.graphs.shadow_trial import Report

log = get_logger(__name__)

REQUEST_INTERVAL_S: Final = 10.0
RETRY: Final = Backoff(first_s=1.0, max_s=3.0)
SETTLED_S: Final = 10.0
"""A compile worker that was followed this long is looked for again at the first wait."""
ASK_FIRST_S: Final = 2.0
"""How long a start waits for a compile worker before it trusts its cache alone."""
TRIAL_REPORT_S: Final = 0.25
LOOK_S: Final = 1.0
"""How often the trusted keys are looked at, which each verification does too, and whether there is
a trial: not more often, for each look takes a token's time at one stream."""


class CompilerClient:
    def __init__(
        self,
        *,
        worker_id: str,
        model: str,
        loader: ArtifactLoader,
        trusted: Trust,
        registry: Registry,
        compile_address: str | None,
        tls: Tls | None = None,
    ) -> None:
        """``trusted``: the keys that the loader's caches believe."""
        self._worker_id = worker_id
        self._model = model
        self._loader = loader
        self._graphs = loader.graphs
        self._trusted = trusted
        self._registry = registry
        self._compile_address = compile_address
        self._tls = tls
        self._asked_again: set[tuple[str, int, str]] = set()
        """Key, version and signer of what was fetched for its new signature."""
        self._distrusted = asyncio.Event()
        """Set when a loaded graph is gone because nobody vouches for it any more."""
        self._reported = ""
        self._explained: set[str] = set()
        """Keys whose absence has been explained in the log."""
        self._condemned = asyncio.Event()
        """Set when there is a crash to report."""

    async def run(self) -> None:
        """Loads what is cached, then asks, watches, fetches and reports until cancelled."""
        await self._ask_first()
        await self._loader.load_cached()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_following())
            tasks.create_task(self._keep_condemning())
            tasks.create_task(self._keep_distrusting())

    async def _ask_first(self) -> None:
        """Removes from the cache what must not be loaded any more, if that can be learnt soon."""
        try:
            async with asyncio.timeout(ASK_FIRST_S):
                async with open_channel(await self._compile_worker(), self._tls) as channel:
                    for _, state in await self._states(pb_grpc.GraphsServiceStub(channel)):
                        await self._loader.retire(state)
        except (TimeoutError, PrecastError, grpc.aio.AioRpcError) as error:
            log.info("loading cached graphs without asking", reason=str(error) or "no answer")

    async def _keep_condemning(self) -> None:
        """Puts graphs that have crashed a rank out of reach, also for this worker's next start."""
        while True:
            crash = await self._graphs.crashes.get()
            for cache in (self._loader.cache, self._loader.trial_cache):
                await asyncio.to_thread(
                    cache.condemn, crash.key, crash.version, crash.signal, crash.lifts
                )
            self._condemned.set()

    async def _keep_distrusting(self) -> None:
        """Gets rid of graphs whose key was revoked, and asks anew once trust has changed."""
        known = self._trusted.keys
        while True:
            await asyncio.sleep(LOOK_S)
            if self._trusted.keys != known:
                known = self._trusted.keys
                await self._loader.distrust()
                self._asked_again.clear()
                self._distrusted.set()

    async def _keep_following(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            if self._graphs.resized.is_set():
                self._graphs.resized.clear()
                await self._loader.load_cached()
            try:
                await self._follow(await self._compile_worker())
            except (PrecastError, grpc.aio.AioRpcError) as error:
                self._report(error)
            failures = 1 if time.monotonic() - began > SETTLED_S else failures + 1
            await asyncio.sleep(RETRY.wait_s(failures))

    def _report(self, error: PrecastError | grpc.aio.AioRpcError) -> None:
        """Logs a failure once, not at every retry."""
        if isinstance(error, grpc.aio.AioRpcError):
            error = error_of(error)
        text = str(error)
        if text != self._reported:
            log.warning("no graphs for now; serving with what is loaded", reason=text)
        self._reported = text

    async def _compile_worker(self) -> str:
        if self._compile_address is not None:
            return self._compile_address
        leases = await self._registry.compile_workers()
        if not leases:
            raise CompilerUnavailable("no live compile worker")
        return min(
            leases, key=lambda lease: (lease.queued + lease.capturing, lease.worker_id)
        ).address

    async def _follow(self, address: str) -> None:
        """Works with one compile worker until it fails, or other graphs are wanted."""
        async with open_channel(address, self._tls) as channel:
            stub: Any = pb_grpc.GraphsServiceStub(channel)
            keys = await self._request(stub)
            self._reported = ""
            tasks = [
                asyncio.ensure_future(self._watch(stub, keys)),
                asyncio.ensure_future(self._keep_asking(stub)),
                asyncio.ensure_future(self._keep_reporting(stub)),
                asyncio.ensure_future(self._keep_reporting_trials(stub)),
                asyncio.ensure_future(self._graphs.resized.wait()),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_reporting(self, stub: Any) -> None:
        """Reports crashes to this compile worker, those of earlier starts too: it may not know."""
        reported: set[Condemned] = set()
        while True:
            self._condemned.clear()
            for crash in await asyncio.to_thread(self._all_condemned) - reported:
                await report_crash(stub, self._worker_id, crash)
                reported.add(crash)
            await self._condemned.wait()

    def _all_condemned(self) -> set[Condemned]:
        return self._loader.cache.condemned() | self._loader.trial_cache.condemned()

    async def _keep_reporting_trials(self, stub: Any) -> None:
        """Tells the compile worker whenever a trial has come on."""
        told: dict[str, Report] = {}
        while True:
            for report in self._graphs.trials.reports():
                if told.get(report.key) != report:
                    await report_trial(stub, self._worker_id, report)
                    told[report.key] = report
            await asyncio.sleep(TRIAL_REPORT_S if self._graphs.trials.busy else LOOK_S)

    async def _follow_trial(self, stub: Any, spec: Spec, state: pb.GraphState) -> None:
        """Takes up a trial that is this worker's, and ends one that is no longer."""
        wanted = state.canary
        if not wanted.version or wanted.worker_id != self._worker_id:
            self._graphs.trials.withdraw(state.key)
            return
        if self._graphs.trials.knows(state.key, wanted.version):
            return
        try:
            new = await fetch_graph(
                stub,
                self._loader.trial_cache,
                state.key,
                spec=spec,
                version=wanted.version,
                worker_id=self._worker_id,
            )
            await self._loader.assign(wanted, new)
        except (ArtifactRejected, NotFound) as error:
            log.error("trial graph rejected", key=state.key, reason=str(error))

    async def _keep_asking(self, stub: Any) -> None:
        """Repeats the request, so that a compile worker or a Redis that lost it captures after
        all."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REQUEST_INTERVAL_S):
                    await self._distrusted.wait()
            borrows = any(map(self._loader.borrows, self._loader.specs()))
            if self._graphs.missing or borrows or self._distrusted.is_set():
                self._distrusted.clear()
                await self._request(stub)

    async def _request(self, stub: Any) -> dict[str, Spec]:
        """Asks for every wanted spec and fetches what is there; returns the spec of each key."""
        keys = {}
        for spec, state in await self._states(stub):
            keys[state.key] = spec
            await self._update(stub, spec, state)
            if state.version == 0:
                await self._borrow(stub, spec)
            if state.version == 0 and state.key not in self._explained:
                self._explained.add(state.key)
                await explain_missing(stub, state)
        return keys

    async def _states(self, stub: Any) -> list[tuple[Spec, pb.GraphState]]:
        """Asks for every wanted spec."""
        specs = self._loader.specs()
        response = await stub.RequestGraphs(
            pb.RequestGraphsRequest(
                specs=[
                    pb.GraphSpec(factors=spec, urgency=self._graphs.urgency(spec)) for spec in specs
                ],
                model=self._model,
                worker_id=self._worker_id,
            ),
            timeout=RPC_TIMEOUT_S,
        )
        return list(zip(specs, response.states, strict=True))

    async def _watch(self, stub: Any, keys: dict[str, Spec]) -> None:
        async for change in stub.WatchGraphs(pb.WatchGraphsRequest(keys=list(keys))):
            spec = keys.get(change.state.key)
            if spec is not None:
                await self._update(stub, spec, change.state)

    async def _update(self, stub: Any, spec: Spec, state: pb.GraphState) -> None:
        """Fetches a version that is not the one we have, and offers what is complete."""
        await self._loader.retire(state)
        await self._follow_trial(stub, spec, state)
        await self._fetch(stub, spec, spec, state)

    async def _fetch(self, stub: Any, spec: Spec, captured: Spec, state: pb.GraphState) -> None:
        """Fetches the version that serves, if it is another one than what is used for ``spec``.

        ``captured``: what it was captured for.
        """
        present = self._loader.get(spec)
        if state.version == 0 or (
            present is not None
            and (present.manifest.key, present.manifest.version) == (state.key, state.version)
            and not self._signed_anew(present, state)
        ):
            return
        try:
            artifact = await fetch_graph(
                stub,
                self._loader.cache,
                state.key,
                spec=captured,
                version=state.version,
                worker_id=self._worker_id,
            )
            await self._loader.put(spec, artifact)
        except ArtifactRejected as error:
            log.error("artifact rejected", key=state.key, version=state.version, reason=str(error))

    async def _borrow(self, stub: Any, spec: Spec) -> None:
        """Takes the best graph for a lesser instruction set, until there is the right one."""
        for lesser_spec in lesser_specs(spec):
            request = pb.ExplainGraphRequest(spec=pb.GraphSpec(factors=lesser_spec), limit=1)
            state = (await stub.ExplainGraph(request, timeout=RPC_TIMEOUT_S)).state
            if state.key:
                await self._loader.retire(state)
            if state.version:
                await self._fetch(stub, spec, lesser_spec, state)
                return

    def _signed_anew(self, present: StoredArtifact, state: pb.GraphState) -> bool:
        """Whether another trusted key has signed what we have since, so that the one that we know
        may be revoked soon. Says so once."""
        signature = (state.key, state.version, state.signer)
        anew = present.signature.signer != state.signer and signature not in self._asked_again
        if not anew or not self._loader.cache.knows_signer(state.signer):
            return False
        self._asked_again.add(signature)
        return True
