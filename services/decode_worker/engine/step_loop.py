"""The loop of steps with one group of ranks.

While the ranks compute one step, the previous step's tokens are turned into text and sent, and the
next step is scheduled and sent behind it: ranks don't wait for their leader. That happens shortly
before the step's end, so that a request which comes meanwhile is in the next one. While nothing but
the next token of each sequence is to be done, there is a shorter way (``same_batch.py``).
"""

import asyncio
from typing import Any, Final

import numpy as np

from services.decode_worker.constraints.masks import MaskRows, masks_of
from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.same_batch import SameBatch
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.step_counts import StepCounts
from services.decode_worker.engine.under_way import UNKNOWN_STEP_TIMEOUT_S, StepsUnderWay
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import Masks, Step

PING_S: Final = 2.0
"""How often ranks that have nothing to do are asked whether they are there."""


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
        self._under_way = StepsUnderWay(
            scheduler=scheduler, delivery=delivery, graphs=graphs, metrics=metrics, pace=pace
        )
        self._wake = asyncio.Event()
        self._same: SameBatch | None = None
        """While it runs."""
        self._masked: ScheduledStep | None = None
        """The last step whose masks were sent."""

    @property
    def counts(self) -> StepCounts:
        return self._under_way.counts

    def nudge(self) -> None:
        """Something changed that the loop should look at."""
        self._wake.set()
        if self._same is not None:
            self._same.interrupt()

    def lose_steps(self) -> ScheduledStep | None:
        """The group has failed, and what it had to do is lost; gives the step that was running."""
        return self._under_way.lose()

    async def run(self, group: RankGroup) -> None:
        """Until it is cancelled, or raises because the group has failed."""
        while True:
            if not self._graphs.settled:
                await self._finish_steps(group)
                await self._graphs.apply(group)
                await self._probe(group)
            elif self._scheduler.decodes_on:
                await self._go_on_with_batch(group)
            await self._almost_done(group)
            self._wake.clear()
            step = self._scheduler.schedule(self._under_way.next_id)
            if step is not None:
                self._under_way.send(group, step)
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

    async def _go_on_with_batch(self, group: RankGroup) -> None:
        """Until there is something else to do than its next step."""
        self._same = SameBatch(
            group=group,
            scheduler=self._scheduler,
            delivery=self._delivery,
            under_way=self._under_way,
            settled=lambda: self._graphs.settled,
        )
        if self._wake.is_set():
            self._same.interrupt()
        try:
            await self._same.run()
        finally:
            self._same = None

    async def _almost_done(self, group: RankGroup) -> None:
        """Until the next step has to be scheduled."""
        if self._under_way:
            await group.sent_steps.almost_done(self._under_way.next_due_s)

    async def _send_masks(self, group: RankGroup) -> None:
        """To the oldest step under way, if its draws wait for some: the tokens before them are
        known now."""
        step = self._under_way.oldest
        if step is None or not step.masked or step is self._masked:
            return
        assert isinstance(step.message, Step), "draws with masks in a step that decodes on"
        self._masked = step
        matchers = [s.matcher if s.alive else None for s in step.masked]
        group.send_masks(masks_message(step.message.step_id, await masks_of(matchers)))
        self._delivery.refuse_stuck(step.masked)

    async def _finish_steps(self, group: RankGroup, but: int = 0) -> None:
        """Takes in what the ranks answer, until so many steps are under way."""
        while len(self._under_way) > but:
            self._under_way.finish(await group.step_done())
            await self._send_masks(group)

    async def _probe(self, group: RankGroup) -> None:
        """Runs a trial graph in a made-up step when live ones have not come in time."""
        probe = self._graphs.trials.probe(self._under_way.next_id)
        if probe is not None:
            self._under_way.take_id()
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
