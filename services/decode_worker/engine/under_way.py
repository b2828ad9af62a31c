"""Steps that the ranks have and have not answered: sent, and taken in when they are over."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.step_counts import StepCounts
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import Step, StepDone

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


@dataclass(frozen=True, kw_only=True)
class _Sent:
    step: ScheduledStep
    graph_size: int
    expected_s: float
    """How long it should take; 0: not known."""


class StepsUnderWay:
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
        self._sent: deque[_Sent] = deque()
        """In the order in which the ranks compute them."""
        self.counts = StepCounts(metrics)
        self.next_id = 0
        self._ranks_wait_since = 0.0
        """When they had nothing to do any more while sequences were running; 0: they have."""

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def oldest(self) -> ScheduledStep | None:
        """The one that the ranks compute now."""
        return self._sent[0].step if self._sent else None

    @property
    def expected_s(self) -> float:
        """How long the oldest one should take; 0: not known, or there is none."""
        return self._sent[0].expected_s if self._sent else 0.0

    @property
    def next_due_s(self) -> float:
        """How long after the oldest one's beginning the step behind it is to be scheduled, to be
        there when the ranks want it."""
        expected = self.expected_s
        return expected - max(AHEAD_S, AHEAD * expected)

    def take_id(self) -> int:
        """Of a step that is sent now."""
        self.next_id += 1
        return self.next_id - 1

    def send(self, group: RankGroup, step: ScheduledStep) -> None:
        """Behind those that the ranks have. It was scheduled with ``next_id``."""
        self.take_id()
        if isinstance(step.message, Step):
            self._delivery.begun(step)
        if not self._sent and self._ranks_wait_since:
            self._metrics.host.inc(time.monotonic() - self._ranks_wait_since)
        message = self._graphs.assigned(
            step.message, tokens=step.tokens, decoding=not step.prompt_tokens
        )
        expected = self._pace.expected_s(step.decode_tokens, step.prompt_tokens)
        sent = _Sent(step=step, graph_size=message.graph_size, expected_s=expected or 0.0)
        self._sent.append(sent)
        group.send_step(message, step.sampling, timeout_s=limit_s(step.tokens, expected))

    def finish(self, done: StepDone) -> None:
        """The ranks have answered the oldest one."""
        sent = self._sent.popleft()
        step = sent.step
        self._pace.observe(step.decode_tokens, step.prompt_tokens, done.step_us / 1e6)
        before = self._scheduler.drafted, self._scheduler.accepted
        self._delivery.take_in(step, done)
        if self._scheduler.drafted != before[0]:
            self._metrics.drafted.inc(self._scheduler.drafted - before[0])
            self._metrics.accepted.inc(self._scheduler.accepted - before[1])
        self.counts.count(step, sent.graph_size, done.step_us)
        self._graphs.ran(done.shadow)
        wait = not self._sent and self._scheduler.running
        self._ranks_wait_since = time.monotonic() if wait else 0.0

    def lose(self) -> ScheduledStep | None:
        """The ranks are gone, and what they had to do is lost; gives the step that was running."""
        running = self.oldest
        self._sent.clear()
        self._ranks_wait_since = 0.0
        return running


def limit_s(tokens: int, expected_s: float | None) -> float:
    """How long the ranks may take for a step of so many tokens."""
    if expected_s is None:
        return UNKNOWN_STEP_TIMEOUT_S + UNKNOWN_TOKEN_TIMEOUT_S * tokens
    return max(STEP_TIMEOUT_S, STEP_TIMEOUT_FACTOR * expected_s)
