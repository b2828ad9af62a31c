"""The short way of steps: whoever looks from outside can't tell it from the long one."""

import asyncio
from typing import Any

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.step_tokens import StepTokens
from precast.tokenizer.load import load_tokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine import delivery as delivery_module
from services.decode_worker.engine import plain_run as plain_run_module
from services.decode_worker.engine.plain_run import PlainRun, _without
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.protocol import StepDone
from tests.support.leader_alone import GroupLost, Leader, Ranks
from tests.support.models import write_model

pytestmark = pytest.mark.timeout(30)


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
    table: TokenTable, most: int, monkeypatch: pytest.MonkeyPatch, blocks: int = 64
) -> tuple[Leader, Ranks]:
    """What becomes of the crowd with runs of so many steps."""
    monkeypatch.setattr(delivery_module, "MOST", most)
    leader, ranks = Leader(table, blocks=blocks), Ranks()
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


async def test_blocks_that_run_out_end_a_run(
    table: TokenTable, short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gives up his own, as in the long way."""
    long, _ = await told(table, 0, monkeypatch, blocks=16)
    leader, _ = await told(table, 32, monkeypatch, blocks=16)
    assert sum(short) > 20
    assert leader.client.tokens == long.client.tokens
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert leader.scheduler.blocks.free_blocks == 16


async def test_long_steps_are_followed_in_time(
    table: TokenTable, short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a timer, where the next one need not be sent at once."""
    monkeypatch.setattr(plain_run_module, "SHORT_S", 0.0)
    leader = Leader(table)
    crowd(leader)
    await leader.until(3, Ranks())
    assert sum(short) > 40
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]


async def test_a_request_that_comes_meanwhile_ends_a_run(
    table: TokenTable, short: list[int]
) -> None:
    leader, told = Leader(table), list[int]()
    leader.add(1, [1, 2, 3], 90)

    def on_token(handle: int, count: int) -> None:
        if (handle, count) == (1, 30):
            asyncio.get_running_loop().call_soon(lambda: leader.add(2, [5] * 9, 10))
        if (handle, count) == (2, 1):
            told.append(len(leader.client.tokens[1]))

    leader.client.on_token = on_token
    await leader.until(2, Ranks())
    assert sum(short) > 20
    assert told[0] <= 36, "it has waited for the run's end"
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert leader.client.tokens[2] == list(range(9, 19))


async def test_a_draw_that_fails_ends_its_request_alone(
    table: TokenTable, short: list[int]
) -> None:
    leader = Leader(table)
    leader.add(1, [1, 2, 3], 90)
    leader.add(2, [1] * 20, 60)
    await leader.until(2, Ranks(fails=30))
    assert sum(short) > 40
    assert leader.client.ends[2].code == pb.ERROR_CODE_INTERNAL
    assert leader.client.tokens[2] == list(range(20, 20 + len(leader.client.tokens[2])))
    assert 20 < len(leader.client.tokens[2]) < 30
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert leader.scheduler.blocks.free_blocks == 64


class Illegible:
    """A decoder that fails at a token."""

    def __init__(self, decoder: Any, at: int) -> None:
        self._decoder = decoder
        self._at = at

    def push(self, token: int) -> str:
        if token == self._at:
            raise ValueError("no such text")
        return str(self._decoder.push(token))


async def test_a_text_that_fails_ends_its_request_alone(
    table: TokenTable, short: list[int]
) -> None:
    leader = Leader(table)
    leader.add(1, [1, 2, 3], 90)
    detokenizer: Any = leader.add(2, [1] * 20, 60).detokenizer
    detokenizer._decoder = Illegible(detokenizer._decoder, at=50)
    await leader.until(2, Ranks())
    assert sum(short) > 40
    assert leader.client.ends[2].code == pb.ERROR_CODE_INTERNAL
    assert leader.client.tokens[2] == list(range(20, 50))
    assert leader.client.tokens[1] == [at % 256 for at in range(3, 93)]
    assert leader.scheduler.blocks.free_blocks == 64


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
    assert sum(short) > 0
    assert leader.client.tokens[1] == [at % 256 for at in range(59, 99)]


def test_a_text_that_can_not_be_made_is_left_out() -> None:
    columns = StepTokens([7, 8, 9], [1, 1, 1], [3, 4, 5], ["a", "", "c"])
    assert _without(columns, {1}) == StepTokens([7, 9], [1, 1], [3, 5], ["a", "c"])
