"""The leader's loop: schedule a step, let the ranks compute it, hand out what it made.

While the ranks compute one step, the previous step's tokens are turned into text and sent, and the
next step is scheduled and sent behind it: ranks don't wait for their leader. That happens shortly
before the step's end, so that a request which comes meanwhile is in the next one. When the group of
ranks fails, another is started and running requests go on where they were: a prompt is computed
again with what followed it, and draws depend on nothing else. Every request ends exactly once,
whatever fails between two steps.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from precast.errors import Unavailable
from precast.log import get_logger
from precast.ops.draw_status import DrawStatus
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.backoff import Backoff
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import FinishReason
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.graphs.autotune.stats import StepStats
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import GroupFailed, RankGroup, RankRefused
from services.decode_worker.ranks.launcher import RankLauncher
from services.decode_worker.ranks.protocol import Init, Logprobs, Ready, StepDone

log = get_logger(__name__)

STEP_TIMEOUT_S: Final = 10.0
STEP_TIMEOUT_FACTOR: Final = 30.0
"""A step that takes so much longer than expected, and that long, never ends: for ranks that compute
for ever. Others are known to hang by what they don't do (``ranks/watch.py``)."""
UNKNOWN_STEP_TIMEOUT_S: Final = 120.0
UNKNOWN_TOKEN_TIMEOUT_S: Final = 2.0
"""For each of its tokens, before anything is known."""
AHEAD_S: Final = 0.002
AHEAD: Final = 0.15
"""How long before the end of a step, by what it should take, the next one is scheduled: so long, or
this part of it. Scheduling, sending and a busy event loop take less than that."""
PING_S: Final = 2.0
"""How often ranks that have nothing to do are asked whether they are there."""
RESTART_BACKOFF: Final = Backoff(first_s=0.5, max_s=5.0)
"""Before each restart of the ranks but the first in a row, which is at once."""
MAX_FAILED_STARTS: Final = 3
"""Groups in a row that can't start before requests stop waiting for the next one."""

_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What one step gave one sequence."""

    request: Request
    token: int
    logprobs: Logprobs | None
    finished: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A step that the ranks have."""

    step: ScheduledStep
    graph_size: int
    expected_s: float
    """How long it should take; 0: not known."""


class Engine:
    def __init__(
        self,
        *,
        scheduler: Scheduler,
        graphs: GraphManager,
        inits: Callable[[], Sequence[Init]],
        launcher: RankLauncher,
        metrics: Metrics,
        pace: Pace,
    ) -> None:
        """``inits`` gives each start of the group its ranks' first commands."""
        self._scheduler = scheduler
        self._graphs = graphs
        self._inits = inits
        self._launcher = launcher
        self._metrics = metrics
        self._pace = pace
        self._requests: dict[str, Request] = {}
        self._wake = asyncio.Event()
        self._unsent: list[_Outcome] = []
        """Outcomes of the last step that nobody was told of yet."""
        self._under_way: deque[_Sent] = deque()
        """Steps that the ranks have, in the order in which they compute them."""
        self._next_step_id = 0
        self._failed_starts = 0
        self.up = False
        """Whether a group of ranks is running."""
        self.started = asyncio.Event()
        """Set once the first group runs."""
        self.ready: tuple[Ready, ...] = ()
        self.restarts = 0
        self._crashed: Mapping[int, str] = {}
        """Ranks of the last group that died of their own native code, and the signal."""
        self.stats = StepStats()
        self.graph_steps = 0
        self.eager_steps = 0
        """Steps that only decoded."""
        self.graph_prompt_steps = 0
        self.eager_prompt_steps = 0
        """Steps with tokens of prompts."""

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    def knows(self, request_id: str) -> bool:
        return request_id in self._requests

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Overloaded, Unavailable or ContextLengthExceeded."""
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Unavailable("the worker's ranks can't be started")
        self._scheduler.add(request.sequence)
        self._requests[request.request_id] = request
        self._wake.set()

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks; returns whether it was there."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.abort(request_id)
        request.finish(pb.FINISH_REASON_ABORTED, flush=False)
        return True

    def nudge(self) -> None:
        """Something changed that the loop should look at."""
        self._wake.set()

    async def run(self) -> None:
        """Serves until cancelled. A first group that can't start raises GroupFailed."""
        try:
            await self._keep_group()
        finally:
            self._emit()
            self._fail(list(self._requests.values()), "the worker has stopped")

    async def _keep_group(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._run_group()
            except Exception as error:
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
        group = await RankGroup.start(self._inits(), self._launcher)
        self._failed_starts = 0
        try:
            self.ready = group.ready
            self._graphs.group_started(group.ready)
            self.up = True
            self.started.set()
            log.info(
                "ranks ready",
                ranks=len(group.ready),
                load_s=[round(ready.load_s, 2) for ready in group.ready],
                weight_mb=[ready.weight_bytes >> 20 for ready in group.ready],
                kernels=group.ready[0].kernels,
            )
            await self._steps(group)
        finally:
            self.up = False
            await group.stop()
            self._crashed = group.crashed()

    def _lose_group(self, reason: str) -> None:
        """Tells requests what they have got, and puts them back in the queue for the next group."""
        self._emit()
        self.restarts += 1
        self._metrics.restarts.inc()
        self._graphs.group_failed(self._crashed)
        lost = self._scheduler.lose_cache(self._under_way[0].step if self._under_way else None)
        self._under_way.clear()
        log.error(
            "ranks failed; restarting them",
            reason=reason,
            crashed=[f"rank {rank}: {name}" for rank, name in self._crashed.items()],
            waiting_requests=self._scheduler.waiting,
            lost_requests=len(lost),
        )
        hopeless = self._failed_starts >= MAX_FAILED_STARTS
        ended = [r for r in self._requests.values() if hopeless or not r.sequence.alive]
        self._fail(ended, f"the worker failed: {reason}")

    def _fail(self, requests: Sequence[Request], message: str) -> None:
        for request in requests:
            self._requests.pop(request.request_id, None)
            self._scheduler.abort(request.request_id)
            request.fail(pb.ERROR_CODE_UNAVAILABLE, message)

    async def _steps(self, group: RankGroup) -> None:
        while True:
            if not self._graphs.settled:
                await self._finish_steps(group)
                await self._graphs.apply(group)
                await self._probe(group)
            await self._almost_done(group)
            self._wake.clear()
            step = self._scheduler.schedule(self._next_step_id)
            if step is not None:
                self._send(group, step)
                self._emit()
                await self._finish_steps(group, but=1 if self._graphs.settled else 0)
            elif self._under_way:
                await self._finish_steps(group)
            else:
                self._emit()
                if not self._graphs.pending:  # one graph is loaded between two steps
                    await self._idle(group)
            if self._under_way:  # else the ranks wait: the next step comes first
                self._emit()
            # Streams get their turn even when every step is ready at once.
            await asyncio.sleep(0)

    async def _almost_done(self, group: RankGroup) -> None:
        """Until the next step has to be scheduled, to be there when the ranks want it."""
        if self._under_way:
            expected = self._under_way[0].expected_s
            await group.step_almost_done(expected - max(AHEAD_S, AHEAD * expected))

    def _send(self, group: RankGroup, step: ScheduledStep) -> None:
        self._next_step_id += 1
        message = self._graphs.assigned(
            step.message, tokens=step.tokens, decoding=not step.prompt_tokens
        )
        expected = self._pace.expected_s(step.decode_tokens, step.prompt_tokens)
        sent = _Sent(step=step, graph_size=message.graph_size, expected_s=expected or 0.0)
        self._under_way.append(sent)
        group.send_step(message, step.sampling, timeout_s=_limit_s(step, expected))

    async def _finish_steps(self, group: RankGroup, but: int = 0) -> None:
        """Takes in what the ranks answer, until so many steps are under way."""
        while len(self._under_way) > but:
            done = await group.step_done()
            self._finish(self._under_way.popleft(), done)

    def _finish(self, sent: _Sent, done: StepDone) -> None:
        step = sent.step
        self._pace.observe(step.decode_tokens, step.prompt_tokens, done.step_us / 1e6)
        before = self._scheduler.drafted, self._scheduler.accepted
        self._unsent += self._apply(step, done)
        self._metrics.drafted.inc(self._scheduler.drafted - before[0])
        self._metrics.accepted.inc(self._scheduler.accepted - before[1])
        self._count(step, sent.graph_size, done.step_us)
        self._graphs.ran(done.shadow)

    async def _probe(self, group: RankGroup) -> None:
        """Runs a trial graph in a made-up step when live ones have not come in time."""
        probe = self._graphs.trials.probe(self._next_step_id)
        if probe is not None:
            self._next_step_id += 1
            group.send_step(probe, timeout_s=UNKNOWN_STEP_TIMEOUT_S)
            self._graphs.trials.observe((await group.step_done()).shadow)

    async def _idle(self, group: RankGroup) -> None:
        """Waits for work, and sees to it that the ranks could do some; raises when they can't."""
        wake = asyncio.ensure_future(self._wake.wait())
        either: set[asyncio.Future[Any]] = {wake, group.failed}
        due_s = self._graphs.trials.due_s()
        await asyncio.wait(
            either,
            timeout=PING_S if due_s is None else min(PING_S, due_s),
            return_when=asyncio.FIRST_COMPLETED,
        )
        wake.cancel()
        if group.failed.done():
            raise group.failure()
        if not self._wake.is_set():
            await group.ping()

    def _apply(self, step: ScheduledStep, done: StepDone) -> Iterator[_Outcome]:
        tokens = np.frombuffer(done.token_ids, dtype=np.int32).tolist()
        for sequence, token, finished, place in self._scheduler.apply(step, tokens):
            request = self._requests.get(sequence.request_id)
            if request is None or request.sequence is not sequence:
                continue  # aborted while the step ran
            if token < 0:
                self._fail_draw(request, DrawStatus(done.failed[place]))
                continue
            if finished is not None:
                del self._requests[sequence.request_id]
                self._metrics.cached.inc(sequence.cached)
            logprobs = done.logprobs[place] if done.logprobs else None
            yield _Outcome(request=request, token=token, logprobs=logprobs, finished=finished)

    def _fail_draw(self, request: Request, status: DrawStatus) -> None:
        """Ends a request whose token could not be drawn; the others of the step go on."""
        self._metrics.failed_draws.labels(status.name.lower()).inc()
        log.error("no token drawn", request_id=request.request_id, reason=status.message)
        self._end(request)
        request.fail(pb.ERROR_CODE_INTERNAL, f"no token could be drawn: {status.message}")

    def _emit(self) -> None:
        """Tells of the last step's outcomes; whatever raises, each is told once."""
        outcomes, self._unsent = self._unsent, []
        for outcome in outcomes:
            request = outcome.request
            try:
                self._tell(request, outcome)
            except Exception as error:  # a fault of one request's text is the others' no business
                log.exception("request failed", request_id=request.request_id)
                self._end(request)
                request.fail(pb.ERROR_CODE_INTERNAL, f"internal error ({type(error).__name__})")

    def _tell(self, request: Request, outcome: _Outcome) -> None:
        if request.ended:
            return
        stopped = request.push(outcome.token, outcome.logprobs)
        if stopped:
            self._end(request)
            request.finish(pb.FINISH_REASON_STOP, flush=False)
        elif outcome.finished is not None:
            request.finish(_REASONS[outcome.finished], flush=True)

    def _end(self, request: Request) -> None:
        self._scheduler.finish(request.request_id)
        self._requests.pop(request.request_id, None)

    def _count(self, step: ScheduledStep, graph_size: int, step_us: int) -> None:
        if step.prompt_tokens:
            self.graph_prompt_steps += graph_size > 0
            self.eager_prompt_steps += graph_size == 0
        else:
            self.graph_steps += graph_size > 0
            self.eager_steps += graph_size == 0
        self.stats.count(step.tokens, graph_size, decoding=not step.prompt_tokens)
        self._metrics.step(step.decode_tokens, step.prompt_tokens, graph_size, step_us)


def _limit_s(step: ScheduledStep, expected_s: float | None) -> float:
    """How long the ranks may take for a step."""
    if expected_s is None:
        return UNKNOWN_STEP_TIMEOUT_S + UNKNOWN_TOKEN_TIMEOUT_S * step.tokens
    return max(STEP_TIMEOUT_S, STEP_TIMEOUT_FACTOR * expected_s)


def _reason(error: Exception) -> str:
    if isinstance(error, GroupFailed):
        return str(error)
    # a defect: it costs a restart, and not the worker with all that it serves
    log.exception("the engine failed unexpectedly", exc_info=error)
    return f"internal error ({type(error).__name__})"
