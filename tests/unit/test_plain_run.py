"""The short way of steps: whoever looks from outside can't tell it from the long one."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.step_tokens import StepTokens
from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.load import load_tokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine import delivery as delivery_module
from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.plain_run import PlainRun, _without
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.response_buffer import Outbox, Recipient
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import SamplingSpec
from services.decode_worker.engine.sequence import Sequence as Tokens
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.step_loop import StepLoop
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.protocol import DecodeOn, StartSampling, Step, StepDone
from services.decode_worker.ranks.sent_steps import SentSteps
from tests.support.models import write_model
from tests.support.simulated_rank import _draw, following

pytestmark = pytest.mark.timeout(30)
BLOCK = 8
STEP_S = 0.0005


class GroupLost(Exception):
    pass


class Ranks:
    """A group whose tokens depend on positions alone. It dies after so many steps."""

    def __init__(self, lives: int = 10**9) -> None:
        self.sent_steps = SentSteps(list, self._fail)
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.commands: list[tuple[type, bytes, bytes]] = []
        """What it was sent: the kind, the new blocks or the tables, and where it stands then."""
        self._lives = lives
        self._last: Step | None = None
        self._tables: list[list[int]] = []
        self._due: list[StepDone] = []

    def send_step(
        self, step: Step | DecodeOn, sampling: Sequence[StartSampling] = (), *, timeout_s: float
    ) -> None:
        whole = self._whole(step)
        shown = step.blocks if isinstance(step, DecodeOn) else step.block_tables
        self.commands.append((type(step), shown, whole.context_lens))
        self.sent_steps.add(timeout_s)
        self._due.append(_draw(whole, STEP_S))
        if len(self._due) == 1:
            self._compute()

    def send_next(self, step: DecodeOn, *, timeout_s: float) -> None:
        self.send_step(step, timeout_s=timeout_s)

    async def step_done(self) -> StepDone:
        done = await self.sent_steps.done()
        if done is None:
            raise GroupLost
        return done

    async def ping(self) -> None:
        pass

    def failure(self) -> Exception:
        return GroupLost()

    def _whole(self, step: Step | DecodeOn) -> Step:
        """In full; each sequence has blocks for its tokens."""
        if isinstance(step, DecodeOn):
            assert self._last is not None
            for place, block in np.frombuffer(step.blocks, np.int32).reshape(-1, 2).tolist():
                self._tables[place].append(block)
            step = following(self._last, step)
        else:
            tables = np.frombuffer(step.block_tables, np.int32)
            self._tables = tables.reshape(-1, step.block_table_width).tolist()
        self._last = step if step.goes_on else None
        lengths = np.frombuffer(step.context_lens, np.int32)
        for table, tokens in zip(self._tables, lengths, strict=True):
            assert len(table) * BLOCK >= tokens
        return step

    def _compute(self) -> None:
        asyncio.get_running_loop().call_later(STEP_S, self._answer)

    def _answer(self) -> None:
        done = self._due.pop(0)
        if self._due:
            self._compute()
        self._lives -= 1
        if self._lives < 0:
            self._fail("died")
        elif not self.failed.done():
            self.sent_steps.answered(done)

    def _fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)
            self.sent_steps.end()


@dataclass(kw_only=True)
class Client:
    """What a gateway of the same host reads."""

    is_writable: bool = True
    kinds: bool = True
    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Any] = field(default_factory=dict)
    on_token: Callable[[int, int], None] = lambda _handle, _count: None
    """Told of the handle, and how many it has."""

    def send_tokens(self, step: StepTokens) -> None:
        self._take(step.handles, step.token_counts, step.token_ids, step.texts)

    def send(self, message: pb.GenerateResponse) -> None:
        step = message.step
        self._take(step.handles, step.token_counts, step.token_ids, step.texts)
        for end in step.ends:
            assert end.handle not in self.ends
            self.ends[end.handle] = end.finished

    def _take(self, handles: Any, counts: Any, token_ids: Any, texts: Any) -> None:
        rest = list(token_ids)
        for handle, count, text in zip(handles, counts, texts, strict=True):
            assert handle not in self.ends
            self.tokens.setdefault(handle, []).extend(rest[:count])
            self.texts[handle] = self.texts.get(handle, "") + text
            rest = rest[count:]
            self.on_token(handle, len(self.tokens[handle]))


class Leader:
    """A step loop without processes."""

    def __init__(self, table: TokenTable, graph_sizes: Sequence[int] = ()) -> None:
        pace = Pace(0.15)
        self.table = table
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            blocks=64,
            block_size=BLOCK,
            max_batch_size=8,
            max_context_length=256,
            max_waiting=8,
            prefill_chunk=64,
            pace=pace,
            graph_sizes=lambda: graph_sizes,
        )
        self.delivery = Delivery(self.scheduler, self.metrics)
        self.loop = StepLoop(
            scheduler=self.scheduler,
            delivery=self.delivery,
            graphs=GraphManager((), lambda: None),
            metrics=self.metrics,
            pace=pace,
        )
        self.client = Client()
        self.outbox = Outbox(columns=True)
        self.outbox.attach(self.client)

    def add(
        self,
        handle: int,
        prompt: list[int],
        max_tokens: int,
        *,
        stops: Sequence[str] = (),
        ends: Sequence[int] = (),
        at_end: bool = False,
        logprobs: int = -1,
    ) -> None:
        sequence = Tokens(
            request_id=str(handle),
            prompt=prompt,
            sampling=SamplingSpec(logprobs=logprobs),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(ends),
        )
        request = Request(
            sequence=sequence,
            recipient=Recipient(request_id=str(handle), handle=handle),
            detokenizer=Detokenizer(self.table, prompt, stops),
            tokens=self.table,
            outbox=self.outbox,
            on_end=lambda _: None,
            hidden_token_ids=frozenset(ends),
            deliver_at_end=at_end,
        )
        self.scheduler.add(sequence)
        self.delivery.add(request)
        self.loop.nudge()

    async def until(self, ended: int, ranks: Ranks) -> None:
        """Until so many requests have ended."""
        running = asyncio.create_task(self.loop.run(ranks))  # type: ignore[arg-type]  # what it asks for
        async with asyncio.timeout(20):
            while len(self.client.ends) < ended and not running.done():
                await asyncio.sleep(0)
        if not running.done():
            running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    @property
    def steps(self) -> float:
        """That metrics know of."""
        return sum(self.metrics._seconds.of("decode").counts)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return TokenTable(load_tokenizer(folder))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the steps of each run."""
    found, settle = list[int](), PlainRun.settle

    def counted(run: PlainRun, metrics: Metrics) -> None:
        found.append(run.taken)
        settle(run, metrics)

    monkeypatch.setattr(PlainRun, "settle", counted)
    return found


def crowd(leader: Leader) -> None:
    """Requests of which some want more than text."""
    leader.add(1, [1, 2, 3], 90)
    leader.add(2, [1] * 20, 60)
    leader.add(3, [4] * 7, 80, ends=[70])


async def told(
    table: TokenTable, most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Leader, Ranks]:
    """What becomes of the crowd with runs of so many steps."""
    monkeypatch.setattr(delivery_module, "MOST", most)
    leader, ranks = Leader(table), Ranks()
    crowd(leader)
    await leader.until(3, ranks)
    return leader, ranks


async def test_nobody_can_tell_the_short_way_from_the_long_one(
    table: TokenTable, short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither clients nor ranks, nor who reads metrics, nor the prefix cache."""
    long, long_ranks = await told(table, 0, monkeypatch)
    assert not short
    leader, ranks = await told(table, 32, monkeypatch)
    assert sum(short) > 40
    assert ranks.commands == long_ranks.commands
    assert leader.client.tokens == long.client.tokens
    assert leader.client.texts == long.client.texts
    assert leader.client.ends == long.client.ends
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert leader.client.ends[3].reason == pb.FINISH_REASON_STOP
    assert leader.steps == long.steps
    assert leader.scheduler.blocks._published == long.scheduler.blocks._published
    assert leader.scheduler.blocks.free_blocks == 64
    for one in (leader, long):
        assert sum(one.metrics.inter_token_seconds.of("").counts) == sum(
            len(tokens) - 1 for tokens in one.client.tokens.values()
        )


@pytest.mark.parametrize(
    "wants",
    [{"stops": ["~"]}, {"at_end": True}, {"logprobs": 0}],
    ids=lambda wants: next(iter(wants)),
)
async def test_who_wants_more_than_text_has_it(
    table: TokenTable, short: list[int], wants: dict[str, Any]
) -> None:
    """And so has the batch that it is in."""
    leader = Leader(table)
    leader.add(1, [1], 40, **wants)
    leader.add(2, [1, 2], 40)
    await leader.until(2, Ranks())
    assert not short
    assert leader.client.tokens[1] == [at % 256 for at in range(1, 41)]


async def test_one_run_follows_another(
    table: TokenTable, short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a step in the long way between."""
    monkeypatch.setattr(delivery_module, "MOST", 8)
    leader, long = Leader(table), list[StepDone]()
    take_in = leader.delivery.take_in

    def counted(step: ScheduledStep, done: StepDone) -> None:
        long.append(done)
        take_in(step, done)

    monkeypatch.setattr(leader.delivery, "take_in", counted)
    leader.add(1, [1], 90)
    await leader.until(1, Ranks())
    assert len(short) >= 10
    assert len(long) + sum(short) == 90
    assert len(long) <= 8  # the first ones and the last ones


async def test_an_aborted_request_has_what_it_was_told_of(
    table: TokenTable, short: list[int]
) -> None:
    leader = Leader(table)
    crowd(leader)

    def on_token(handle: int, count: int) -> None:
        if (handle, count) == (1, 30):
            asyncio.get_running_loop().call_soon(leader.delivery.abort, "1")

    leader.client.on_token = on_token
    await leader.until(3, Ranks())
    assert sum(short) > 20
    end = leader.client.ends[1]
    assert end.reason == pb.FINISH_REASON_ABORTED
    assert end.completion_tokens == len(leader.client.tokens[1]) < 90
    assert leader.client.ends[2].completion_tokens == 60
    assert leader.scheduler.blocks.free_blocks == 64


@pytest.mark.parametrize("lives", range(20, 60, 3))
async def test_a_group_that_is_lost_costs_nobody_a_token(
    table: TokenTable, short: list[int], lives: int
) -> None:
    leader, ranks = Leader(table), Ranks(lives)
    crowd(leader)
    with pytest.raises(GroupLost):
        await leader.until(3, ranks)
    assert sum(short) > 0
    leader.delivery.tell()
    leader.scheduler.lose_steps(leader.loop.lose_steps())
    await leader.until(3, Ranks())
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert [leader.client.ends[handle].completion_tokens for handle in (1, 2)] == [90, 60]


async def test_a_client_that_reads_slowly_gets_all_of_it(
    table: TokenTable, short: list[int]
) -> None:
    leader = Leader(table)
    crowd(leader)
    reading = asyncio.create_task(_read(leader))

    def on_token(_: int, count: int) -> None:
        leader.client.is_writable = count % 9 != 0

    leader.client.on_token = on_token
    await leader.until(3, Ranks())
    reading.cancel()
    assert sum(short) > 10
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]


async def _read(leader: Leader) -> None:
    """What the stream does with what can't be sent at once."""
    async for response in leader.outbox.responses():
        leader.client.is_writable = True
        leader.client.send(response)


async def test_who_asks_for_counts_gets_all_of_them(table: TokenTable, short: list[int]) -> None:
    leader, seen = Leader(table), list[tuple[int, int]]()
    leader.add(1, [1], 60)

    def on_token(_: int, count: int) -> None:
        if count == 40:
            loop = asyncio.get_running_loop()
            loop.call_soon(lambda: seen.append((count, leader.loop.counts.eager_steps)))

    leader.client.on_token = on_token
    await leader.until(1, Ranks())
    assert sum(short) > 20
    [(told, counted)] = seen
    assert 0 <= told - 1 - counted <= 1  # the first one is the prompt's


async def test_a_run_ends_where_drafts_may_follow(table: TokenTable, short: list[int]) -> None:
    """Tokens that repeat themselves: what comes next can be guessed."""
    leader = Leader(table, graph_sizes=[8])
    leader.add(1, [*range(60, 118), 1], 40)
    await leader.until(1, Ranks())
    assert leader.scheduler.drafted > 0
    assert leader.client.tokens[1] == [at % 256 for at in range(59, 99)]


def test_a_text_that_can_not_be_made_is_left_out() -> None:
    columns = StepTokens([7, 8, 9], [1, 1, 1], [3, 4, 5], ["a", "", "c"])
    assert _without(columns, {1}) == StepTokens([7, 9], [1, 1], [3, 5], ["a", "c"])
