"""Steps of one batch that decodes on, each dealt with in the callback that brings the last answer.

Between two steps the processor's caches belong to the model: whatever the leader touches comes from
memory, and to wake a task costs more than to take in a token. So there is no task here, and where
steps are short no timer either: the next step is sent as soon as one is over, while the ranks have
begun with the one between. A request that comes meanwhile waits for a short step more.
"""

import asyncio
from collections.abc import Callable

from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.plain_run import is_short
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.under_way import StepsUnderWay
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import StepDone


class SameBatch:
    def __init__(
        self,
        *,
        group: RankGroup,
        scheduler: Scheduler,
        delivery: Delivery,
        under_way: StepsUnderWay,
        settled: Callable[[], bool],
    ) -> None:
        """``settled``: whether graphs are; it is asked now and then only."""
        self._group = group
        self._scheduler = scheduler
        self._delivery = delivery
        self._under_way = under_way
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """There is something else to do than the next step."""
        self._interrupted = True

    async def run(self) -> None:
        """Until the next step is another one, or something else has to be seen to. Raises what is
        raised meanwhile."""
        try:
            self._group.sent_steps.follow(self)
            if not self._over.done() and self._timer is None and len(self._under_way) < 2:
                self._guarded(self._plan)
            await self._over
        finally:
            self._stop()
            self._under_way.count()

    def answered(self, done: StepDone, now: float) -> None:
        run = self._under_way.run
        group = None if self._interrupted or run is None or not run.short else self._group
        try:
            if run is None or not run.take(done, now, group, self._plan):
                self._take_in(done)
        except Exception as error:
            self._fail(error)

    def ended(self) -> None:
        self._leave()

    def _take_in(self, done: StepDone) -> None:
        self._under_way.settle()
        self._under_way.finish(done)
        if len(self._under_way) < 2:
            self._plan()
        self._delivery.tell()
        self._under_way.begin_run()

    def _plan(self) -> None:
        """Sends the next step now, or in time."""
        if self._timer is not None:
            self._cancel_timer()
        left = 0.0
        if not is_short(self._under_way.expected_s):
            left = self._group.sent_steps.left_s(self._under_way.next_due_s)
        if left > 0:
            self._timer = self._loop.call_later(left, self._guarded, self._send)
        else:
            self._send()

    def _send(self) -> None:
        self._timer = None
        run, step = self._under_way.run, None
        if run is not None:
            if not self._interrupted and run.send_next(self._group):
                return
            self._under_way.count()
        if not self._interrupted and (self._under_way.repeats or self._settled()):
            step = self._scheduler.decode_on()
        if step is None:
            self._leave()
        else:
            self._under_way.send_on(self._group, step)
            self._under_way.begin_run()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stop()
        if not self._over.done():
            self._over.set_exception(error)

    def _leave(self) -> None:
        self._stop()
        if not self._over.done():
            self._over.set_result(None)

    def _stop(self) -> None:
        self._group.sent_steps.unfollow()
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
