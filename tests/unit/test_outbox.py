"""What waits to be sent on a Generate stream is bounded, merged and in order."""

import asyncio

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.engine.response_buffer import MAX_UNREAD_ENDINGS, Outbox


async def test_unread_deltas_of_a_request_are_merged_and_precede_its_end() -> None:
    outbox = Outbox()
    outbox.delta("a", pb.TokenDelta(token_ids=[1], text="x"))
    outbox.delta("a", pb.TokenDelta(token_ids=[2], text="y"))
    outbox.end(pb.GenerateResponse(request_id="a", finished=pb.GenerationFinished()))
    outbox.close()
    first, last = [response async for response in outbox.responses()]
    assert (list(first.delta.token_ids), first.delta.text) == ([1, 2], "xy")
    assert last.WhichOneof("event") == "finished"


async def test_no_room_until_the_client_reads() -> None:
    outbox = Outbox()
    for number in range(MAX_UNREAD_ENDINGS):
        await asyncio.wait_for(outbox.room(), 5)
        outbox.end(pb.GenerateResponse(request_id=str(number)))
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    responses = outbox.responses()
    for number in range(MAX_UNREAD_ENDINGS):
        assert (await anext(responses)).request_id == str(number)
    rest = asyncio.ensure_future(anext(responses))
    await asyncio.wait_for(waiting, 5)
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)
