"""Steps that the ranks have: what they answered, and whether they get on with them."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from services.decode_worker.ranks.protocol import StepDone
from services.decode_worker.ranks.watch import LOOK_S, Watch


class Follower(Protocol):
    """Deals with answers where they come in: no task has to be woken for one."""

    def answered(self, done: StepDone, now: float) -> None:
        """The answer to the oldest step under way, which came at ``now`` (monotonic, s)."""

    def ended(self) -> None:
        """No more answers come: the group has failed."""


class SentSteps:
    def __init__(self, pids: Callable[[], Sequence[int]], fail: Callable[[str], None]) -> None:
        """``pids``: of the ranks, which are looked at while steps are under way. ``fail`` is told
        what is wrong with them."""
        self._pids = pids
        self._fail = fail
        self._limits: deque[float] = deque()
        """How long each step that was sent may take, once those before it are over (s)."""
        self.add_behind: Final[Callable[[float], None]] = self._limits.append
        """``add`` where others are under way."""
        self._since = 0.0
        """When the oldest of them became that."""
        self._answers: deque[StepDone] = deque()
        self._follower: Follower | None = None
        self._reader: asyncio.Future[None] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._watch: Watch | None = None
        self._ended = False

    def add(self, limit_s: float) -> None:
        """Another one was sent behind those that are under way."""
        if not self._limits:
            self._since = time.monotonic()
        self._limits.append(limit_s)
        if self._look is None:
            self._look_later()

    def answered(self, done: StepDone) -> None:
        """Rank 0 has computed the oldest step."""
        if not self._limits:
            self._fail("rank 0 answered a step that it was not sent")
            return
        self._limits.popleft()
        self._since = now = time.monotonic()
        self._watch = None
        if (follower := self._follower) is not None:  # who has had those before
            follower.answered(done, now)
        else:
            self._answers.append(done)
            self._tell()

    def follow(self, follower: Follower) -> None:
        """From now on answers go to the follower as they come, until ``unfollow``; no one else
        waits meanwhile."""
        self._follower = follower
        while self._answers and self._follower is not None:
            follower.answered(self._answers.popleft(), time.monotonic())
        if self._ended and self._follower is not None:
            follower.ended()

    def unfollow(self) -> None:
        self._follower = None

    async def done(self) -> StepDone | None:
        """The answer to the oldest step under way; None: there won't be any."""
        while not self._answers:
            if self._ended:
                return None
            await self._news()
        return self._answers.popleft()

    def left_s(self, of_s: float) -> float:
        """What is left of so much time since the oldest step under way became that."""
        return self._since + of_s - time.monotonic()

    async def almost_done(self, after_s: float) -> None:
        """Until the oldest step under way is over, or has taken so long."""
        left = self.left_s(after_s)
        if left > 0 and not self._answers and not self._ended:
            timer = asyncio.get_running_loop().call_later(left, self._tell)
            await self._news()
            timer.cancel()

    def end(self) -> None:
        """No answers come any more."""
        self._ended = True
        if self._follower is not None:
            self._follower.ended()
        self._tell()

    def close(self) -> None:
        if self._look is not None:
            self._look.cancel()

    async def _news(self) -> None:
        """Until there is an answer to a step, or the group has failed."""
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader

    def _tell(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_at_step)

    def _look_at_step(self) -> None:
        """Once a second while steps are under way: one timer for all of them, not one each."""
        self._look = None
        if not self._limits or self._ended:
            return
        taken = time.monotonic() - self._since
        if taken >= self._limits[0]:
            self._fail(f"no answer to step within {self._limits[0]:g} s")
        elif taken < LOOK_S / 2:
            pass  # it has just begun, as nearly all have: looking would cost more than it does
        elif self._watch is None:
            self._watch = Watch(self._pids())
        elif (hung := self._watch.hung()) is not None:
            self._fail(f"{hung}, with step to answer")
        self._look_later()
