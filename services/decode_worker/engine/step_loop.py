"""The loop of steps with one group of ranks.

While the ranks compute one step, the previous step's tokens are turned into text and sent, and the
next step is scheduled and sent behind it: ranks don't wait for their leader. That happens shortly
before the step's end, so that a request which comes meanwhile is in the next one.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from services.decode_worker.constraints.masks import MaskRows, masks_of
from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.step_counts import StepCounts
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import Masks, StepDone

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


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A step that the ranks have."""

    step: ScheduledStep
    graph_size: int
    expected_s: float
    """How long it should take; 0: not known."""


class StepLoop:
    def __init__(
        self,
        *,
        scheduler: Scheduler,
        delivery: Delivery,
        graphs: GraphManager,
        metrics: Metrics,
        pace: Pace,
    ) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._graphs = graphs
        self._metrics = metrics
        self._pace = pace
        self._wake = asyncio.Event()
        self._under_way: deque[_Sent] = deque()
        """Steps that the ranks have, in the order in which they compute them."""
        self._next_step_id = 0
        self._masked: ScheduledStep | None = None
        """The last step whose masks were sent."""
        self.counts = StepCounts(metrics)

    def nudge(self) -> None:
        """Something changed that the loop should look at."""
        self._wake.set()

    def lose_steps(self) -> ScheduledStep | None:
        """The group has failed, and what it had to do is lost; gives the step that was running."""
        running = self._under_way[0].step if self._under_way else None
        self._under_way.clear()
        return running

    async def run(self, group: RankGroup) -> None:
        """Until it is cancelled, or raises because the group has failed."""
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
                await self._send_masks(group)
                self._delivery.tell()
                await self._finish_steps(group, but=1 if self._graphs.settled else 0)
            elif self._under_way:
                await self._finish_steps(group)
            else:
                self._delivery.tell()
                if not self._graphs.pending:  # one graph is loaded between two steps
                    await self._idle(group)
            if self._under_way:  # else the ranks wait: the next step comes first
                self._delivery.tell()
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

    async def _send_masks(self, group: RankGroup) -> None:
        """To the oldest step under way, if its draws wait for some: the tokens before them are
        known now."""
        step = self._under_way[0].step if self._under_way else None
        if step is None or not step.masked or step is self._masked:
            return
        self._masked = step
        matchers = [s.matcher if s.alive else None for s in step.masked]
        group.send_masks(masks_message(step.message.step_id, await masks_of(matchers)))
        self._delivery.refuse_stuck(step.masked)

    async def _finish_steps(self, group: RankGroup, but: int = 0) -> None:
        """Takes in what the ranks answer, until so many steps are under way."""
        while len(self._under_way) > but:
            done = await group.step_done()
            self._finish(self._under_way.popleft(), done)
            await self._send_masks(group)

    def _finish(self, sent: _Sent, done: StepDone) -> None:
        step = sent.step
        self._pace.observe(step.decode_tokens, step.prompt_tokens, done.step_us / 1e6)
        before = self._scheduler.drafted, self._scheduler.accepted
        self._delivery.take_in(step, done)
        self._metrics.drafted.inc(self._scheduler.drafted - before[0])
        self._metrics.accepted.inc(self._scheduler.accepted - before[1])
        self.counts.count(step, sent.graph_size, done.step_us)
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


def masks_message(step_id: int, masks: MaskRows) -> Masks:
    return Masks(
        step_id=step_id,
        rows=np.array(masks.rows, dtype=np.int32).tobytes(),
        words=masks.words.tobytes(),
        width=masks.words.shape[1],
    )


def _limit_s(step: ScheduledStep, expected_s: float | None) -> float:
    """How long the ranks may take for a step."""
    if expected_s is None:
        return UNKNOWN_STEP_TIMEOUT_S + UNKNOWN_TOKEN_TIMEOUT_S * step.tokens
    return max(STEP_TIMEOUT_S, STEP_TIMEOUT_FACTOR * expected_s)
