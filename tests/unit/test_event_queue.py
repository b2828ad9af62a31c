"""The bounded queue between workers' connections and a client."""

import asyncio

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from precast.errors import InvalidRequest, PrecastError, WorkerUnavailable
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.routing.event_queue import MAX_EVENTS, Delta, Event, EventQueue

FINISHED = pb.GenerationFinished(reason=pb.FINISH_REASON_STOP, completion_tokens=1)
SOON_S = 0.02


def delta(token: int, text: str | None = None) -> Delta:
    shown = f"{token}," if text is None else text
    return Delta(
        tokens=1,
        text=shown,
        logprobs=[pb.TokenLogprob(token_id=token, logprob=-1.0, text=shown)],
    )


def ids_of(delta: Delta) -> list[int]:
    return [report.token_id for report in delta.logprobs]


def never_again(_index: int, _error: PrecastError) -> bool:
    return False


def deltas_of(events: list[tuple[int, Event]], index: int = 0) -> list[Delta]:
    return [e for i, e in events if i == index and isinstance(e, Delta)]


async def test_events_come_in_order() -> None:
    queue = EventQueue(1, never_again)
    queue.put(0, delta(1))
    queue.finish(0, FINISHED)
    assert await queue.take(SOON_S) == [(0, delta(1)), (0, FINISHED)]


def test_a_wait_that_is_nearly_over_and_the_next() -> None:
    """uvloop has no timers below half a millisecond: it calls back at once."""

    async def take_twice() -> None:
        queue = EventQueue(1, never_again)
        first = asyncio.create_task(queue.take(0.0003))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(queue.take(SOON_S), 5) == []
        first.cancel()

    uvloop.run(take_twice())


async def test_take_waits_for_what_comes_later_and_no_longer_than_it_may() -> None:
    queue = EventQueue(1, never_again)
    assert await queue.take(SOON_S) == []
    waiting = asyncio.create_task(queue.take(10))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.put(0, delta(1))
    assert await waiting == [(0, delta(1))]


async def test_an_error_comes_after_the_deltas_and_only_the_first_counts() -> None:
    queue = EventQueue(2, never_again)
    queue.put(0, delta(1))
    queue.lose(0, WorkerUnavailable("gone"))
    queue.lose(1, InvalidRequest("wrong"))
    assert await queue.take(SOON_S) == [(0, delta(1))]
    for _ in range(2):
        with pytest.raises(WorkerUnavailable, match="gone"):
            await queue.take(SOON_S)


async def test_a_slow_reader_gets_merged_deltas_and_loses_nothing() -> None:
    queue = EventQueue(2, never_again)
    count = 3 * MAX_EVENTS
    for token in range(count):
        queue.put(0, delta(token))
    queue.put(1, delta(7))
    queue.finish(0, FINISHED)
    events = await queue.take(SOON_S)
    deltas = deltas_of(events)
    assert len(deltas) == MAX_EVENTS
    assert (deltas_of(events, 1), events[-1]) == ([delta(7)], (0, FINISHED))
    assert "".join(event.text for event in deltas) == "".join(f"{n}," for n in range(count))
    assert sum(event.tokens for event in deltas) == count
    assert [token for event in deltas for token in ids_of(event)] == list(range(count))


async def test_what_shows_nothing_is_held_back() -> None:
    asked: list[int] = []

    def again(index: int, _error: PrecastError) -> bool:
        asked.append(index)
        return len(asked) < 3

    queue = EventQueue(1, again)
    queue.put(0, delta(1, ""))
    assert await queue.take(SOON_S) == []
    queue.lose(0, WorkerUnavailable("gone"))
    queue.begin_anew(0)
    queue.put(0, delta(2, ""))
    queue.lose(0, WorkerUnavailable("gone"))  # and goes on
    queue.put(0, delta(3, "é"))
    [(_, first)] = await queue.take(SOON_S)
    assert isinstance(first, Delta)
    assert (ids_of(first), first.text) == ([2, 3], "é")
    queue.put(0, delta(4, ""))
    queue.lose(0, WorkerUnavailable("gone"))
    assert await queue.take(SOON_S) == [(0, delta(4, ""))]
    with pytest.raises(WorkerUnavailable):
        await queue.take(SOON_S)
    queue.lose(0, WorkerUnavailable("gone"))
    assert len(asked) == 3, "not asked once it has failed"


async def test_a_generation_without_text_ends_with_its_tokens() -> None:
    queue = EventQueue(1, never_again)
    queue.put(0, delta(1, ""))
    queue.finish(0, FINISHED)
    assert await queue.take(SOON_S) == [(0, delta(1, "")), (0, FINISHED)]


class Reader:
    """A response that has begun, and follows its queue."""

    def __init__(self) -> None:
        self.queue = EventQueue(1, never_again)
        self.takes = True
        self.fails = False
        self.followed: list[Delta] = []

    async def begun(self) -> "asyncio.Task[list[tuple[int, Event]]]":
        """One that waits for more."""
        self.queue.put(0, delta(0))
        await self.queue.take(SOON_S)
        self.queue.follow(self._follow)
        waiting = asyncio.create_task(self.queue.take(10))
        await asyncio.sleep(0)
        return waiting

    def _follow(self, _index: int, delta: Delta) -> bool:
        if self.fails:
            raise ZeroDivisionError
        if self.takes:
            self.followed.append(delta)
        return self.takes


async def test_a_follower_gets_deltas_at_once_and_take_the_rest() -> None:
    reader = Reader()
    waiting = await reader.begun()
    for token in (1, 2):
        reader.queue.put(0, delta(token))
    assert reader.followed == [delta(1), delta(2)]
    await asyncio.sleep(0)
    assert not waiting.done()
    reader.queue.finish(0, FINISHED)
    assert await waiting == [(0, FINISHED)]


async def test_what_a_follower_can_t_take_and_all_behind_it_is_for_take() -> None:
    reader = Reader()
    waiting = await reader.begun()
    reader.takes = False
    reader.queue.put(0, delta(1))
    reader.takes = True
    reader.queue.put(0, delta(2))
    assert await waiting == [(0, delta(1)), (0, delta(2))]
    reader.queue.put(0, delta(3))  # while nobody waits
    assert await reader.queue.take(SOON_S) == [(0, delta(3))]
    assert reader.followed == []


async def test_the_first_of_a_choice_is_not_for_a_follower() -> None:
    reader = Reader()
    reader.queue.follow(reader._follow)
    waiting = asyncio.create_task(reader.queue.take(10))
    await asyncio.sleep(0)
    reader.queue.put(0, delta(1))
    assert await waiting == [(0, delta(1))]
    assert reader.followed == []


async def test_a_follower_that_fails_ends_its_request() -> None:
    reader = Reader()
    waiting = await reader.begun()
    reader.fails = True
    reader.queue.put(0, delta(1))
    with pytest.raises(ZeroDivisionError):
        await waiting


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "take", "lose"]), st.integers(0, 2), st.sampled_from("ab ")),
    max_size=400,
)


@given(steps=STEPS)
async def test_nothing_is_lost_twice_or_out_of_order(
    steps: list[tuple[str, int, str]],
) -> None:
    """Whatever comes in whichever order: each choice's text is that of its last beginning."""
    expected: list[list[str]] = [[], [], []]
    got: list[str] = ["", "", ""]
    shown = [False] * 3
    queue = EventQueue(3, lambda _index, _error: True)
    for step, index, letter in steps:
        if step == "put":
            text = letter.strip()
            queue.put(index, delta(0, text))
            expected[index].append(text)
            shown[index] = shown[index] or bool(text)
        elif step == "lose":
            queue.lose(index, WorkerUnavailable("gone"))
            if not shown[index]:
                queue.begin_anew(index)
                expected[index].clear()
        elif step == "take":
            await _collect(queue, got)
    for index in range(3):
        queue.finish(index, FINISHED)
    counts = await _collect(queue, got)
    assert max(counts) <= MAX_EVENTS + 1
    assert got == ["".join(texts) for texts in expected]


async def _collect(queue: EventQueue, got: list[str]) -> list[int]:
    counts = [0, 0, 0]
    for index, event in await queue.take(0):
        counts[index] += 1
        if isinstance(event, Delta):
            got[index] += event.text
    return counts
