"""A worker's engine: it keeps a group of ranks running that computes steps (``step_loop.py``).

When the group fails, another is started and running requests go on where they were: what was in
the KV cache is there still, for its memory is the leader's (``ranks/kv_memory.py``), and draws
depend on nothing else. After a crash of native code, which may have written anywhere, prompts are
computed again with what followed them. Every request ends exactly once, whatever fails between two
steps.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import Final

from precast.errors import Unavailable
from precast.log import get_logger
from precast.system.backoff import Backoff
from services.decode_worker.engine.agreed_content import AgreedContent
from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.step_counts import StepCounts
from services.decode_worker.engine.step_loop import StepLoop
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import (
    FilesChanged,
    GroupFailed,
    RankGroup,
    RankRefused,
)
from services.decode_worker.ranks.kv_memory import KvMemory
from services.decode_worker.ranks.launcher import RankLauncher
from services.decode_worker.ranks.protocol import Init, Ready

log = get_logger(__name__)

RESTART_BACKOFF: Final = Backoff(first_s=0.5, max_s=5.0)
"""Before each restart of the ranks but the first in a row, which is at once."""
MAX_FAILED_STARTS: Final = 3
"""Groups in a row that can't start before requests stop waiting for the next one."""


class Engine:
    def __init__(
        self,
        *,
        scheduler: Scheduler,
        graphs: GraphManager,
        inits: Callable[[], Many[Init]],
        launcher: RankLauncher,
        metrics: Metrics,
        pace: Pace,
        content: AgreedContent | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """``inits`` gives each start of the group its ranks' first commands. ``content``: of the
        model's files, what all ranks have to have loaded. ``on_change`` is called when a group is
        ``up`` and when it is not any more."""
        self._scheduler = scheduler
        self._graphs = graphs
        self._inits = inits
        self._launcher = launcher
        self._metrics = metrics
        self._on_change = on_change
        self._content = content or AgreedContent()
        self._delivery = Delivery(scheduler, metrics)
        self._steps = StepLoop(
            scheduler=scheduler,
            delivery=self._delivery,
            graphs=graphs,
            metrics=metrics,
            pace=pace,
        )
        self._memory: KvMemory | None = None
        self._failed_starts = 0
        self.up = False
        """Whether a group of ranks is running."""
        self.started = asyncio.Event()
        """Set once the first group runs."""
        self.ready: tuple[Ready, ...] = ()
        self.restarts = 0
        self._crashed: Mapping[int, str] = {}
        """Ranks of the last group that died of their own native code, and the signal."""

    @property
    def counts(self) -> StepCounts:
        """What steps there were."""
        return self._steps.counts

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    def knows(self, request_id: str) -> bool:
        return self._delivery.knows(request_id)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Overloaded, Unavailable or ContextLengthExceeded."""
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Unavailable("the worker's ranks can't be started")
        self._scheduler.add(request.sequence)
        self._delivery.add(request)
        self._steps.nudge()

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks; returns whether it was there."""
        return self._delivery.abort(request_id)

    def nudge(self) -> None:
        """Something changed that the loop should look at."""
        self._steps.nudge()

    async def run(self) -> None:
        """Serves until cancelled. A first group that can't start raises GroupFailed, and so does
        one that has loaded other files than the first."""
        try:
            await self._keep_group()
        finally:
            self._delivery.tell()
            self._delivery.fail_all("the worker has stopped")
            if self._memory is not None:
                self._memory.close()

    async def _keep_group(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._run_group()
            except Exception as error:
                if isinstance(error, FilesChanged):
                    raise
                if not self.started.is_set() and self._is_final(error):
                    raise
                self._lose_group(_reason(error))
            failures = failures + 1 if time.monotonic() - began < 30.0 else 1
            await asyncio.sleep(RESTART_BACKOFF.wait_s(failures - 1))

    def _is_final(self, error: Exception) -> bool:
        """Whether a group that has never run would not run if it were started again."""
        died = isinstance(error, GroupFailed) and not isinstance(error, RankRefused)
        return not died or self._failed_starts >= MAX_FAILED_STARTS

    async def _run_group(self) -> None:
        self._crashed = {}
        self._failed_starts += 1
        inits = self._inits()
        self._memory = self._memory or KvMemory(len(inits))
        group = await RankGroup.start(inits, self._launcher, self._memory)
        self._failed_starts = 0
        try:
            self._check_files(group.ready)
            self.ready = group.ready
            self._graphs.group_started(group.ready)
            self.up = True
            self.started.set()
            self._on_change()
            log.info(
                "ranks ready",
                ranks=len(group.ready),
                load_s=[round(ready.load_s, 2) for ready in group.ready],
                weight_mb=[ready.weight_bytes >> 20 for ready in group.ready],
                kernels=group.ready[0].kernels,
            )
            await self._steps.run(group)
        finally:
            self.up = False
            self._on_change()
            await group.stop()
            self._crashed = group.crashed()

    def _check_files(self, ready: Many[Ready]) -> None:
        """Ranks that start again go on with what is in the KV cache, and all with one another."""
        if not all(self._content.agrees(one.content) for one in ready):
            raise FilesChanged("the model's files have changed since the worker began to load them")

    def _lose_group(self, reason: str) -> None:
        """Tells requests what they have got, and has them go on with the next group."""
        self._delivery.tell()
        self.restarts += 1
        self._metrics.restarts.inc()
        self._graphs.group_failed(self._crashed)
        lost = self._lose_steps()
        log.error(
            "ranks failed; restarting them",
            reason=reason,
            crashed=[f"rank {rank}: {name}" for rank, name in self._crashed.items()],
            running_requests=self._scheduler.running,
            waiting_requests=self._scheduler.waiting,
            lost_requests=len(lost),
        )
        message = f"the worker failed: {reason}"
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._delivery.fail_all(message)
        self._delivery.fail_lost(message)

    def _lose_steps(self) -> list[Sequence]:
        """Puts sequences back to what is left of them; gives those that are given up."""
        running = self._steps.lose_steps()
        if not self._crashed:
            return self._scheduler.lose_steps(running)
        if self._memory is not None:
            self._memory.clear()
        return self._scheduler.lose_cache(running)


def _reason(error: Exception) -> str:
    if isinstance(error, GroupFailed):
        return str(error)
    # a defect: it costs a restart, and not the worker with all that it serves
    log.exception("the engine failed unexpectedly", exc_info=error)
    return f"internal error ({type(error).__name__})"
