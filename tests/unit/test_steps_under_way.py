"""Steps that are like the one before them: sent as they should be, and none is counted twice or
forgotten."""

from typing import Any

import pytest

from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.engine.under_way import MOST_UNCOUNTED, StepsUnderWay
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.protocol import DecodeOn, Step, StepDone

TOKENS = 3 * MOST_UNCOUNTED
STEP_US = 2000
SIZE = 1


class Ranks:
    """What they are sent, and what they answer."""

    def __init__(self) -> None:
        self.sent: list[Step | DecodeOn] = []
        self.answered = 0

    def send_step(self, step: Step | DecodeOn, _sampling: Any = (), *, timeout_s: float) -> None:
        assert timeout_s > 0
        self.sent.append(step)

    def answer(self) -> StepDone:
        self.answered += 1
        return StepDone(token_ids=[5], step_us=STEP_US)


class Bench:
    def __init__(self) -> None:
        self.ranks: Any = Ranks()
        self.graphs = GraphManager((SIZE,), lambda: None)
        self.pace = Pace(0.15)
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            blocks=64,
            block_size=4,
            max_batch_size=2,
            max_context_length=200,
            max_waiting=2,
            prefill_chunk=8,
            pace=self.pace,
        )
        self.steps = StepsUnderWay(
            scheduler=self.scheduler,
            delivery=Delivery(self.scheduler, self.metrics),
            graphs=self.graphs,
            metrics=self.metrics,
            pace=self.pace,
        )

    def add(self, name: str) -> None:
        self.scheduler.add(
            Sequence(
                request_id=name,
                prompt=[1, 2, 3],
                sampling=SamplingSpec(),
                max_tokens=TOKENS,
                stop_token_ids=frozenset(),
            )
        )

    def schedule(self) -> None:
        step = self.scheduler.schedule(self.steps.next_id)
        assert step is not None
        self.steps.send(self.ranks, step)

    def decode_on(self) -> bool:
        """Whether the batch goes on."""
        step = self.scheduler.decode_on()
        if step is not None:
            self.steps.send_on(self.ranks, step)
        return step is not None

    def finish(self) -> None:
        self.steps.finish(self.ranks.answer())

    @property
    def measured(self) -> float:
        """Steps of one token that metrics know of."""
        return sum(self.metrics._seconds.of("decode").counts)


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    bench.add("a")
    bench.schedule()  # its prompt
    bench.schedule()
    bench.finish()
    return bench


async def test_each_step_is_counted_once_and_at_the_end(bench: Bench) -> None:
    while bench.decode_on():
        bench.finish()
    bench.steps.count()  # the batch has changed
    while len(bench.steps):
        bench.finish()
    steps = len(bench.ranks.sent) - 1
    assert steps == TOKENS - 1
    assert bench.measured == steps
    assert bench.steps.counts.eager_steps == steps
    assert bench.graphs._table.missed(SIZE) == steps
    assert bench.pace.decode_s(1) == pytest.approx(STEP_US / 1e6)


async def test_steps_are_counted_when_somebody_asks(bench: Bench) -> None:
    for _ in range(MOST_UNCOUNTED // 2):
        assert bench.decode_on()
        bench.finish()
    asked = bench.steps.counts.eager_steps
    assert asked == bench.measured == MOST_UNCOUNTED // 2
    bench.steps.lose()
    assert bench.measured == asked
