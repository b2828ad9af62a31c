"""The bounded inbox between a worker's stream and a client."""

import asyncio

import pytest

from precast.errors import WorkerUnavailable
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.routing.event_queue import MAX_EVENTS, Inbox

FINISHED = pb.GenerationFinished(reason=pb.FINISH_REASON_STOP, completion_tokens=1)


def delta(token: int) -> pb.TokenDelta:
    return pb.TokenDelta(
        token_ids=[token],
        text=f"{token},",
        logprobs=[pb.TokenLogprob(token_id=token, logprob=-1.0, text=f"{token},")],
    )


async def test_events_come_in_order() -> None:
    inbox = Inbox()
    inbox.put(delta(1))
    inbox.end(FINISHED)
    assert (await inbox.get()).text == "1,"  # type: ignore[union-attr]
    assert await inbox.get() is FINISHED


async def test_get_waits_for_what_comes_later() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    inbox.put(delta(1))
    assert (await waiting) == delta(1)


async def test_an_error_comes_after_the_deltas_and_only_the_first_end_counts() -> None:
    inbox = Inbox()
    inbox.put(delta(1))
    inbox.end(WorkerUnavailable("gone"))
    inbox.end(FINISHED)
    inbox.put(delta(2))
    assert await inbox.get() == delta(1)
    for _ in range(2):
        with pytest.raises(WorkerUnavailable, match="gone"):
            await inbox.get()


async def test_a_slow_reader_gets_merged_deltas_and_loses_nothing() -> None:
    inbox = Inbox()
    count = 3 * MAX_EVENTS
    for token in range(count):
        inbox.put(delta(token))
    inbox.end(FINISHED)
    events = [await inbox.get() for _ in range(MAX_EVENTS + 1)]
    deltas = [event for event in events if isinstance(event, pb.TokenDelta)]
    assert len(deltas) == MAX_EVENTS
    assert events[-1] is FINISHED
    assert "".join(event.text for event in deltas) == "".join(f"{n}," for n in range(count))
    assert [token for event in deltas for token in event.token_ids] == list(range(count))
    assert [lp.token_id for event in deltas for lp in event.logprobs] == list(range(count))
