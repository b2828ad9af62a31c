"""Gets this worker its graphs: from its cache, then from a compile worker.

Everything is repeated until it is so: missing graphs are asked for again every few seconds, and a
compile worker that went away is looked for again. No request ever waits for this. Before anything
is loaded from the cache, a compile worker that is in reach is asked which generations serve: one
may have been rolled back or quarantined while this worker was down.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc.aio

from precast.errors import (
    ArtifactRejected,
    CompilerUnavailable,
    NotFound,
    PrecastError,
)
from precast.graphs.fetch import GraphCache, fetch_graph
from precast.graphs.key import spec_digest, spec_part
from precast.graphs.store import StoredArtifact
from precast.graphs.targets import lesser
from precast.graphs.trust import Trust
from precast.graphs.v1 import graphs_service_pb2 as pb
from precast.graphs.v1 import graphs_service_pb2_grpc as pb_grpc
from precast.log import get_logger
from precast.registry import Registry
from precast.rpc import error_of, open_channel
from services.decode_worker.canary import Assignment, Report
from services.decode_worker.graph_reports import (
    RPC_TIMEOUT_S,
    explain_missing,
    report_canary,
    report_crash,
)
from services.decode_worker.graph_set import GraphSet, Offer

log = get_logger(__name__)

REQUEST_INTERVAL_S: Final = 10.0
RETRY_S: Final = 1.0
ASK_FIRST_S: Final = 2.0
"""How long a start waits for a compile worker before it trusts its cache alone."""
CANARY_REPORT_S: Final = 0.25
TRUST_POLL_S: Final = 0.5
"""How often the trusted keys are looked at; each verification looks at them too."""

Spec = dict[str, str]


class GraphsClient:
    def __init__(
        self,
        *,
        worker_id: str,
        model: str,
        graphs: GraphSet,
        cache: GraphCache,
        candidates: GraphCache,
        trusted: Trust,
        registry: Registry,
        compile_address: str | None,
        on_offer: Callable[[], None],
    ) -> None:
        """``candidates`` keeps graphs that this worker tries, out of the sight of others that
        share ``cache``; ``trusted`` is whom both believe. ``on_offer`` is called when a graph is
        ready to be loaded."""
        self._worker_id = worker_id
        self._model = model
        self._graphs = graphs
        self._cache = cache
        self._candidates = candidates
        self._trusted = trusted
        self._registry = registry
        self._compile_address = compile_address
        self._on_offer = on_offer
        self._artifacts: dict[str, StoredArtifact] = {}
        """Newest verified artifact by spec digest."""
        self._asked_again: set[tuple[str, int, str]] = set()
        """Key, generation and signer of what was fetched for its new signature."""
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
        await asyncio.to_thread(self._load_cached)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_following())
            tasks.create_task(self._keep_condemning())
            tasks.create_task(self._keep_distrusting())

    def _load_cached(self) -> None:
        """Offers what the cache holds. Reads and hashes files."""
        for wanted in self._graphs.wanted:
            for spec in wanted.specs:
                found = map(self._cache.find, [spec, *lesser_specs(spec)])
                artifact = next(filter(None, found), None)
                if artifact is not None:
                    self._artifacts[spec_digest(spec)] = artifact
        self._offer_complete()

    async def _ask_first(self) -> None:
        """Removes from the cache what must not be loaded any more, if that can be learnt soon."""
        try:
            async with asyncio.timeout(ASK_FIRST_S):
                async with open_channel(await self._compile_worker()) as channel:
                    for _, state in await self._states(pb_grpc.GraphsServiceStub(channel)):
                        await self._retire(state)
        except (TimeoutError, PrecastError, grpc.aio.AioRpcError) as error:
            log.info("loading cached graphs without asking", reason=str(error) or "no answer")

    async def _keep_condemning(self) -> None:
        """Puts graphs that have crashed a rank out of reach, also for this worker's next start."""
        while True:
            crash = await self._graphs.crashes.get()
            for cache in (self._cache, self._candidates):
                await asyncio.to_thread(cache.condemn, crash.key, crash.generation, crash.signal)
            self._condemned.set()

    async def _keep_distrusting(self) -> None:
        """Gets rid of graphs whose key was revoked, and asks anew once trust has changed."""
        known = self._trusted.keys
        while True:
            await asyncio.sleep(TRUST_POLL_S)
            if self._trusted.keys != known:
                known = self._trusted.keys
                await asyncio.to_thread(self._distrust)
                self._graphs.forget_removed()
                self._asked_again.clear()
                self._distrusted.set()
                self._on_offer()

    def _distrust(self) -> None:
        for key, _ in self._candidates.distrust():
            self._graphs.canary.withdraw(key)
        self._cache.distrust()
        for digest, artifact in list(self._artifacts.items()):
            if not artifact.graph_path.exists():
                del self._artifacts[digest]

    async def _keep_following(self) -> None:
        while True:
            try:
                await self._follow(await self._compile_worker())
            except (PrecastError, grpc.aio.AioRpcError) as error:
                self._report(error)
            await asyncio.sleep(RETRY_S)

    def _report(self, error: PrecastError | grpc.aio.AioRpcError) -> None:
        """Logs a trouble once, not at every retry."""
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
        """Works with one compile worker until it fails."""
        async with open_channel(address) as channel:
            stub: Any = pb_grpc.GraphsServiceStub(channel)
            keys = await self._request(stub)
            self._reported = ""
            tasks = [
                asyncio.ensure_future(self._watch(stub, keys)),
                asyncio.ensure_future(self._keep_asking(stub)),
                asyncio.ensure_future(self._keep_reporting(stub)),
                asyncio.ensure_future(self._keep_reporting_canaries(stub)),
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
        reported: set[tuple[str, int, str]] = set()
        while True:
            self._condemned.clear()
            for crash in await asyncio.to_thread(self._all_condemned) - reported:
                await report_crash(stub, self._worker_id, *crash)
                reported.add(crash)
            await self._condemned.wait()

    def _all_condemned(self) -> set[tuple[str, int, str]]:
        return self._cache.condemned() | self._candidates.condemned()

    async def _keep_reporting_canaries(self, stub: Any) -> None:
        """Tells the compile worker whenever a trial has come on."""
        told: dict[str, Report] = {}
        while True:
            for report in self._graphs.canary.reports():
                if told.get(report.key) != report:
                    await report_canary(stub, self._worker_id, report)
                    told[report.key] = report
            await asyncio.sleep(CANARY_REPORT_S)

    async def _follow_canary(self, stub: Any, spec: Spec, state: pb.GraphState) -> None:
        """Takes up a trial that is this worker's, and ends one that is no longer."""
        wanted = state.canary
        if not wanted.generation or wanted.worker_id != self._worker_id:
            self._graphs.canary.withdraw(state.key)
            return
        if self._graphs.canary.knows(state.key, wanted.generation):
            return
        try:
            candidate = await fetch_graph(
                stub,
                self._candidates,
                state.key,
                spec=spec,
                generation=wanted.generation,
                worker_id=self._worker_id,
            )
        except (ArtifactRejected, NotFound) as error:
            log.error("candidate rejected", key=state.key, reason=str(error))
            return
        self._assign(wanted, candidate)

    def _assign(self, wanted: pb.CanaryAssignment, candidate: StoredArtifact) -> None:
        """Has the ranks of the candidate's key try it, beside the others' present graphs."""
        digest = spec_digest(spec_part(candidate.manifest.factors))
        size = int(candidate.manifest.factors["batch_size"])
        specs = [w.specs for w in self._graphs.wanted if w.batch_size == size]
        digests = [spec_digest(spec) for spec in (specs[0] if specs else ())]
        found = [candidate if d == digest else self._artifacts.get(d) for d in digests]
        artifacts = [artifact for artifact in found if artifact is not None]
        if len(artifacts) < len(found):
            return
        self._graphs.canary.assign(
            Assignment(
                key=candidate.manifest.key,
                generation=wanted.generation,
                batch_size=size,
                paths=tuple(str(artifact.graph_path) for artifact in artifacts),
                keys=tuple(artifact.manifest.key for artifact in artifacts),
                generations=tuple(artifact.manifest.generation for artifact in artifacts),
                steps=wanted.steps,
                live_s=wanted.live_s,
            )
        )
        self._on_offer()

    async def _keep_asking(self, stub: Any) -> None:
        """Repeats the request, so that a compile worker or a Redis that lost it captures after
        all."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REQUEST_INTERVAL_S):
                    await self._distrusted.wait()
            borrows = any(map(self._borrows, self._specs()))
            if self._graphs.missing or borrows or self._distrusted.is_set():
                self._distrusted.clear()
                await self._request(stub)

    async def _request(self, stub: Any) -> dict[str, Spec]:
        """Asks for every wanted spec and fetches what is there; returns the spec of each key."""
        keys = {}
        for spec, state in await self._states(stub):
            keys[state.key] = spec
            await self._update(stub, spec, state)
            if state.generation == 0:
                await self._borrow(stub, spec)
            if state.generation == 0 and state.key not in self._explained:
                self._explained.add(state.key)
                await explain_missing(stub, state)
        return keys

    async def _states(self, stub: Any) -> list[tuple[Spec, pb.GraphState]]:
        """Asks for every wanted spec."""
        specs = self._specs()
        response = await stub.RequestGraphs(
            pb.RequestGraphsRequest(
                specs=[
                    pb.GraphSpec(factors=spec, urgency=self._graphs.urgency(spec)) for spec in specs
                ],
                model=self._model,
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
        """Fetches a generation that is not the one we have, and offers what is complete."""
        await self._retire(state)
        await self._follow_canary(stub, spec, state)
        await self._fetch(stub, spec, spec, state)

    async def _fetch(self, stub: Any, spec: Spec, captured: Spec, state: pb.GraphState) -> None:
        """Fetches the generation that serves, if it is another one than what is used for ``spec``.

        ``captured``: what it was captured for.
        """
        present = self._artifacts.get(spec_digest(spec))
        if state.generation == 0 or (
            present is not None
            and (present.manifest.key, present.manifest.generation) == (state.key, state.generation)
            and not self._signed_anew(present, state)
        ):
            return
        try:
            artifact = await fetch_graph(
                stub, self._cache, state.key, spec=captured, generation=state.generation
            )
        except ArtifactRejected as error:
            log.error(
                "artifact rejected", key=state.key, generation=state.generation, reason=str(error)
            )
            return
        self._artifacts[spec_digest(spec)] = artifact
        self._offer_complete()

    def _borrows(self, spec: Spec) -> bool:
        """Whether what is used for a spec was captured for a lesser instruction set."""
        present = self._artifacts.get(spec_digest(spec))
        return present is not None and present.manifest.factors["isa"] != spec["isa"]

    async def _borrow(self, stub: Any, spec: Spec) -> None:
        """Takes the best graph for a lesser instruction set, until there is the right one."""
        for lesser_spec in lesser_specs(spec):
            request = pb.ExplainGraphRequest(spec=pb.GraphSpec(factors=lesser_spec), limit=1)
            state = (await stub.ExplainGraph(request, timeout=RPC_TIMEOUT_S)).state
            if state.key:
                await self._retire(state)
            if state.generation:
                await self._fetch(stub, spec, lesser_spec, state)
                return

    def _signed_anew(self, present: StoredArtifact, state: pb.GraphState) -> bool:
        """Whether another trusted key has signed what we have since, so that the one that we know
        may be revoked soon. Says so once."""
        signature = (state.key, state.generation, state.signer)
        anew = present.signature.signer != state.signer and signature not in self._asked_again
        if not anew or not self._cache.knows_signer(state.signer):
            return False
        self._asked_again.add(signature)
        return True

    async def _retire(self, state: pb.GraphState) -> None:
        """Forgets generations that must not be loaded any more."""
        quarantined = frozenset(state.quarantined)
        for cache, serving in ((self._cache, state.generation), (self._candidates, 0)):
            await asyncio.to_thread(cache.retire, state.key, serving, quarantined)
        self._graphs.quarantine(state.key, quarantined)
        self._artifacts = {
            digest: artifact
            for digest, artifact in self._artifacts.items()
            if artifact.manifest.key != state.key or artifact.manifest.generation not in quarantined
        }
        if self._graphs.pending:
            self._on_offer()

    def _specs(self) -> list[Spec]:
        """Each distinct spec once, smallest batch first: ranks with equal shards share a graph."""
        unique = {
            spec_digest(spec): spec for wanted in self._graphs.wanted for spec in wanted.specs
        }
        return list(unique.values())

    def _offer_complete(self) -> None:
        """Offers every batch size for which all ranks' artifacts are here and not loaded yet."""
        for wanted in self._graphs.wanted:
            artifacts = [self._artifacts.get(spec_digest(spec)) for spec in wanted.specs]
            complete = [artifact for artifact in artifacts if artifact is not None]
            if len(complete) == len(artifacts):
                self._offer(wanted.batch_size, complete)

    def _offer(self, batch_size: int, artifacts: Sequence[StoredArtifact]) -> None:
        offer = Offer(
            batch_size=batch_size,
            paths=tuple(artifact.graph_path for artifact in artifacts),
            keys=tuple(artifact.manifest.key for artifact in artifacts),
            generations=tuple(artifact.manifest.generation for artifact in artifacts),
            signed=all(map(self._cache.is_signed, artifacts)),
        )
        current = self._graphs.current(batch_size)
        if current is None or current.identity != offer.identity:
            self._graphs.offer(offer)
            self._on_offer()


def lesser_specs(spec: Spec) -> list[Spec]:
    """The same graph for the instruction sets below, best first."""
    return [{**spec, "isa": isa} for isa in lesser(spec["isa"])]
