"""Steps that the ranks have and have not answered: sent, and taken in when they are over."""

import time
from collections import deque
from itertools import groupby
from typing import Final, NamedTuple

import msgspec

from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.plain_run import PlainRun, RunSteps
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.step import ScheduledStep, StepBatch
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


MOST_UNCOUNTED: Final = 16
"""Steps of one batch that are counted together: by then what counts them is warm in the processor's
caches from the first of them on."""


class _Sent(NamedTuple):
    step: ScheduledStep
    graph_size: int
    expected_s: float
    """How long it should take; 0: not known."""
    limit_s: float
    decodes_on: bool = False
    """Whether steps like it may follow without being thought about."""
    repeats: bool = False
    """Whether it is one of those."""


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
        self._counts = StepCounts(metrics)
        self._uncounted: list[tuple[_Sent, int]] = []
        """Steps that are over, and what they took, us."""
        self._like: _Sent | None = None
        """What the next step of its batch is like."""
        self.next_id = 0
        self.run: PlainRun | None = None
        """The steps that are dealt with in the short way; what it sends and takes in is in none of
        the others' books before it is settled."""
        delivery.settle = self.settle
        self._ranks_wait_since = 0.0
        """When they had nothing to do any more while sequences were running; 0: they have."""

    def __len__(self) -> int:
        return len(self._sent) if self.run is None else self.run.under_way

    @property
    def counts(self) -> StepCounts:
        self.count()
        return self._counts

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

    def take_id(self) -> None:
        """A step is sent that has it."""
        self.next_id += 1

    def send(self, group: RankGroup, step: ScheduledStep) -> None:
        """Behind those that the ranks have. It was scheduled with ``next_id``."""
        if isinstance(step.message, Step):
            self.take_id()
            self._delivery.begun(step)
        if not self._sent and self._ranks_wait_since:
            self._metrics.host.inc(time.monotonic() - self._ranks_wait_since)
        message = self._graphs.assigned(
            step.message, tokens=step.tokens, decoding=not step.prompt_tokens
        )
        expected = self._pace.expected_s(step.decode_tokens, step.prompt_tokens)
        limit = limit_s(step.tokens, expected)
        self._like = None
        self._sent.append(_Sent(step, message.graph_size, expected or 0.0, limit))
        group.send_step(message, step.sampling, timeout_s=limit)

    @property
    def repeats(self) -> bool:
        """Whether the next step may be like the one before it."""
        return self._like is not None and self._like.decodes_on

    def send_on(self, group: RankGroup, step: ScheduledStep) -> None:
        """As ``send``, of a batch that decodes on: most steps are like the one before."""
        like = self._like
        if (
            like is None
            or not like.decodes_on
            or not self._sent
            or like.step.batch is not step.batch
        ):
            self.send(group, step)
            self._like = self._sent[-1]._replace(decodes_on=self._graphs.repeats)
            self._sent[-1] = self._like
            return
        self._graphs.repeat()
        self._sent.append(
            _Sent(
                step, like.graph_size, like.expected_s, like.limit_s, decodes_on=True, repeats=True
            )
        )
        message = msgspec.structs.replace(step.message, graph_size=like.graph_size)
        group.send_step(message, timeout_s=like.limit_s)

    def begin_run(self) -> None:
        """From now on steps are dealt with in the short way (``plain_run.py``), if they may be."""
        like = self._like
        if self.run is not None or like is None or not like.decodes_on or not self._sent:
            return
        batch = like.step.batch
        if all(sent.decodes_on and sent.step.batch is batch for sent in self._sent):
            steps = RunSteps(
                graph_size=like.graph_size,
                expected_s=like.expected_s,
                limit_s=like.limit_s,
                under_way=len(self._sent),
            )
            self.run = self._delivery.plain_run(batch, steps)

    def settle(self) -> None:
        """There is no short way any more, and everything is as if there had been none."""
        run, self.run = self.run, None
        if run is None:
            return
        run.settle(self._metrics)
        self._sent += [self._sent[-1]._replace(repeats=True)] * run.sent
        self._uncounted += [(self._sent.popleft(), step_us) for step_us in run.steps_us]
        self._graphs.repeated(run.sent, run.taken)

    def finish(self, done: StepDone) -> None:
        """The ranks have answered the oldest one."""
        sent = self._sent.popleft()
        if sent.decodes_on:  # without drafts
            self._delivery.take_in(sent.step, done)
        else:
            self._take_in_drafts(sent.step, done)
        self._graphs.ran(done.shadow)
        self._uncounted.append((sent, done.step_us))
        if not sent.decodes_on or not self.repeats or len(self._uncounted) >= MOST_UNCOUNTED:
            self.count()
        wait = not self._sent and self._scheduler.running
        self._ranks_wait_since = time.monotonic() if wait else 0.0

    def _take_in_drafts(self, step: ScheduledStep, done: StepDone) -> None:
        before = self._scheduler.drafted, self._scheduler.accepted
        self._delivery.take_in(step, done)
        if self._scheduler.drafted != before[0]:
            self._metrics.drafted.inc(self._scheduler.drafted - before[0])
            self._metrics.accepted.inc(self._scheduler.accepted - before[1])

    def count(self) -> None:
        """Counts and measures the steps that are over. What the next one is like is found out
        again."""
        self.settle()
        steps, self._uncounted = self._uncounted, []
        self._like = None
        for (batch, graph_size), alike in groupby(steps, _kind):
            steps_us = [step_us for _, step_us in alike]
            seconds = [step_us / 1e6 for step_us in steps_us]
            self._pace.observe(batch.decode_tokens, batch.prompt_tokens, *seconds)
            self._counts.count(batch, graph_size, steps_us)
        if repeats := sum(sent.repeats for sent, _ in steps):
            self._graphs.count_repeats(steps[-1][0].step.tokens, repeats)

    def lose(self) -> ScheduledStep | None:
        """The ranks are gone, and what they had to do is lost; gives the step that was running."""
        self.count()
        running = self.oldest
        self._sent.clear()
        self._ranks_wait_since = 0.0
        return running


def _kind(counted: tuple[_Sent, int]) -> tuple[StepBatch, int]:
    sent, _ = counted
    return sent.step.batch, sent.graph_size


def limit_s(tokens: int, expected_s: float | None) -> float:
    """How long the ranks may take for a step of so many tokens."""
    if expected_s is None:
        return UNKNOWN_STEP_TIMEOUT_S + UNKNOWN_TOKEN_TIMEOUT_S * tokens
    return max(STEP_TIMEOUT_S, STEP_TIMEOUT_FACTOR * expected_s)
