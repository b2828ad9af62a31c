"""What waits to be sent on a Generate stream is bounded, merged and in order."""

import asyncio

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.step_tokens import StepTokens, decode, encode
from services.decode_worker.engine import response_buffer
from services.decode_worker.engine.response_buffer import (
    MAX_UNREAD_ENDINGS,
    Ending,
    Outbox,
    Output,
    Recipient,
)

A, B = (Recipient(request_id=name, handle=handle) for name, handle in (("a", 7), ("b", 8)))
FINISHED = pb.GenerationFinished(reason=pb.FINISH_REASON_STOP)
FAILED = pb.GenerationError(code=pb.ERROR_CODE_INTERNAL, message="x")


def report(token: int) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token, logprob=-1.0, text="x" * 50)


async def all_of(outbox: Outbox) -> list[pb.GenerateResponse]:
    outbox.close()
    return [response async for response in outbox.responses()]


async def test_unread_tokens_of_a_request_are_merged_and_precede_its_end() -> None:
    outbox = Outbox()
    outbox.token(A, 1, "x", None)
    outbox.token(A, 2, "y", None)
    outbox.end(Ending(recipient=A, end=FINISHED))
    first, last = await all_of(outbox)
    assert first.request_id == last.request_id == "a"
    assert (list(first.delta.token_ids), first.delta.text) == ([1, 2], "xy")
    assert last.WhichOneof("event") == "finished"


async def test_columns_have_all_requests_of_a_step_in_one_message() -> None:
    outbox = Outbox(columns=True)
    outbox.token(A, 1, "x", None)
    outbox.token(B, 5, "", report(5))
    outbox.token(B, 6, "é", report(6))
    outbox.text(A, "y")
    outbox.end(Ending(recipient=A, end=FINISHED))
    outbox.end(Ending(recipient=B, end=FAILED))
    [message] = await all_of(outbox)
    step = message.step
    assert list(step.handles) == [7, 8]
    assert (list(step.token_counts), list(step.token_ids)) == ([1, 2], [1, 5, 6])
    assert list(step.texts) == ["xy", "é"]
    assert [(each.handle, list(each.tokens)) for each in step.logprobs] == [
        (8, [report(5), report(6)])
    ]
    assert [(end.handle, end.WhichOneof("end")) for end in step.ends] == [
        (7, "finished"),
        (8, "error"),
    ]


@pytest.mark.parametrize("columns", [True, False])
async def test_what_is_too_much_for_a_message_is_cut(
    columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, each token with its text, the end with the last, and no handle twice in a
    message."""
    monkeypatch.setattr(response_buffer, "MAX_COLUMN_BYTES", 10_000)
    outbox = Outbox(columns=columns)
    for recipient in (A, B):
        whole = Output(recipient=recipient)
        for token in range(1000):
            whole.add(token, "é", report(token))
        outbox.whole(whole)
        outbox.end(Ending(recipient=recipient, end=FINISHED))
    messages = await all_of(outbox)
    assert len(messages) > 10
    assert all(message.ByteSize() < 20_000 for message in messages)
    ids: dict[int, list[int]] = {7: [], 8: []}
    texts = {7: "", 8: ""}
    for message in messages:
        step = message.step if columns else _as_step(message)
        assert len(set(step.handles)) == len(step.handles)
        reports = {each.handle: each.tokens for each in step.logprobs}
        rest = list(step.token_ids)
        for handle, count, text in zip(step.handles, step.token_counts, step.texts, strict=True):
            mine, rest = rest[:count], rest[count:]
            assert [each.token_id for each in reports.get(handle, ())] == mine
            ids[handle] += mine
            texts[handle] += text
            assert len(texts[handle]) == len(ids[handle])
        if columns:
            ended = {end.handle for end in step.ends}
            assert ended == {handle for handle in step.handles if len(ids[handle]) == 1000}
    assert ids == {7: list(range(1000)), 8: list(range(1000))}
    assert texts == {7: "é" * 1000, 8: "é" * 1000}


def _as_step(message: pb.GenerateResponse) -> pb.StepOutput:
    handle = {"a": 7, "b": 8}[message.request_id]
    delta = message.delta
    return pb.StepOutput(
        handles=[handle],
        token_counts=[len(delta.token_ids)],
        token_ids=delta.token_ids,
        texts=[delta.text],
        logprobs=[pb.RequestLogprobs(handle=handle, tokens=delta.logprobs)],
    )


async def test_no_room_until_the_client_reads() -> None:
    outbox = Outbox()
    for number in range(MAX_UNREAD_ENDINGS):
        await asyncio.wait_for(outbox.room(), 5)
        recipient = Recipient(request_id=str(number), handle=0)
        outbox.end(Ending(recipient=recipient, end=FINISHED))
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


class Peer:
    """A stream's other end, which may not read for a while."""

    def __init__(self, *, kinds: bool = False) -> None:
        self.is_writable = True
        self.kinds = kinds
        self.got: list[int] = []
        self.tokens: list[StepTokens] = []

    def send(self, message: pb.GenerateResponse) -> None:
        assert self.is_writable
        self.got += message.step.token_ids

    def send_tokens(self, tokens: StepTokens) -> None:
        assert self.is_writable
        self.got += tokens.token_ids
        self.tokens.append(tokens)

    async def read(self, outbox: Outbox) -> None:
        """As a server of streams does it: waits until the peer reads, then sends."""
        async for response in outbox.responses():
            while not self.is_writable:
                await asyncio.sleep(0)
            self.send(response)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_step_is_sent_in_the_turn_that_told_it() -> None:
    outbox, peer = Outbox(columns=True), Peer()
    outbox.attach(peer)
    outbox.token(A, 1, "x", None)
    outbox.token(B, 2, "y", None)
    assert peer.got == []
    outbox.flush()
    assert peer.got == [1, 2]
    assert await all_of(outbox) == []


async def test_a_step_of_tokens_alone_is_a_message_of_its_own_kind() -> None:
    outbox, peer = Outbox(columns=True), Peer(kinds=True)
    outbox.attach(peer)
    outbox.token(A, 1, "x", None)
    outbox.token(A, 2, "", None)
    outbox.token(B, 3, "é", None)
    outbox.flush()
    both = StepTokens([7, 8], [2, 1], [1, 2, 3], ["x", "é"])
    assert [decode(encode(tokens)) for tokens in peer.tokens] == [both]


@pytest.mark.parametrize("more", ["report", "end", "heartbeat", "prompt"])
async def test_a_step_with_more_than_tokens_is_a_whole_message(more: str) -> None:
    outbox, peer = Outbox(columns=True), Peer(kinds=True)
    outbox.attach(peer)
    outbox.token(A, 1, "x", None)
    outbox.token(B, 2, "y", report(2) if more == "report" else None)
    if more == "end":
        outbox.end(Ending(recipient=A, end=FINISHED))
    elif more == "heartbeat":
        outbox.heartbeat(pb.Heartbeat())
    elif more == "prompt":
        outbox.prompt(A, [report(1)])
    outbox.flush()
    assert (peer.got, peer.tokens) == ([1, 2], [])
    outbox.flush()
    assert peer.tokens == [], "nothing waits"
    assert await all_of(outbox) == []


@pytest.mark.parametrize("kinds", [False, True])
async def test_what_a_slow_reader_gets_stays_in_order(
    monkeypatch: pytest.MonkeyPatch, kinds: bool
) -> None:
    """Steps that come while the stream's task holds messages which the peer did not take yet."""
    monkeypatch.setattr(response_buffer, "MAX_COLUMN_BYTES", 10_000)
    outbox, peer = Outbox(columns=True), Peer(kinds=kinds)
    outbox.attach(peer)
    reader = asyncio.create_task(peer.read(outbox))
    await turns()
    peer.is_writable = False
    for token in range(600):  # several messages
        outbox.token(A, token, "x", report(token))
    outbox.flush()
    await turns()
    assert peer.got == []
    peer.is_writable = True
    outbox.token(A, 600, "x", None)
    outbox.flush()  # before the reader's turn
    await turns()
    outbox.token(A, 601, "x", None)
    outbox.flush()
    await turns()
    assert peer.got == list(range(602))
    reader.cancel()
