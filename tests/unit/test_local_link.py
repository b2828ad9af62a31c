"""Messages between processes of one host: whole, in order, bounded, and the end is noticed."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvloop

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc import local_link
from precast.rpc.local_link import LocalLink, connect_locally, serving_locally
from precast.rpc.step_tokens import StepTokens, merged

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Runs a coroutine on each kind of loop."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield lambda work: runner.run(asyncio.wait_for(work, 20))


def text_of(message: bytes) -> str:
    return pb.AbortRequest.FromString(message).request_id


class Got:
    """What a client has received."""

    def __init__(self, link: LocalLink) -> None:
        self.texts: list[str] = []
        self._changed = asyncio.Event()
        link.deliver(self._add)

    def _add(self, message: bytes) -> None:
        self.texts.append(text_of(message))
        self._changed.set()

    async def until(self, count: int) -> list[str]:
        while len(self.texts) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.texts


async def echo(
    requests: AsyncIterator[pb.AbortRequest], _: LocalLink
) -> AsyncIterator[pb.AbortRequest]:
    """Says that it is there, then what it hears."""
    yield pb.AbortRequest(request_id="hello")
    async for request in requests:
        yield request


def test_messages_of_any_size_come_whole_and_in_order(run: Any) -> None:
    sizes = [0, 1, 60, 70_000, 3_000_000, 5]
    sent = [str(number) * size for number, size in enumerate(sizes)]

    async def talk() -> list[str]:
        name = secrets.token_hex(8)
        async with serving_locally(name, echo, pb.AbortRequest.FromString):
            link = await connect_locally(name)
            assert link is not None
            for text in sent:
                link.send(pb.AbortRequest(request_id=text))
            await asyncio.sleep(0.05)  # some of it comes before anybody wants it
            got = await Got(link).until(1 + len(sent))
            link.close()
            return got

    assert run(talk()) == ["hello", *sent]


def test_tokens_come_between_messages_in_order(run: Any) -> None:
    """Also in parts; those that come together may be handed out together."""
    many = StepTokens(list(range(50_000)), [1] * 50_000, list(range(50_000)), ["é"] * 50_000)

    async def handler(
        requests: AsyncIterator[pb.AbortRequest], link: LocalLink
    ) -> AsyncIterator[pb.AbortRequest]:
        async for request in requests:
            link.send_tokens(StepTokens([1], [2], [3, 4], ["x"]))
            link.send_tokens(many)
            yield request

    async def talk() -> list[object]:
        name, got = secrets.token_hex(8), list[object]()
        async with serving_locally(name, handler, pb.AbortRequest.FromString):
            link = await connect_locally(name)
            assert link is not None
            over = asyncio.Event()

            def add(message: bytes) -> None:
                got.append(text_of(message))
                over.set()

            link.deliver(add, got.append)
            link.send(pb.AbortRequest(request_id="last"))
            await over.wait()
            return got

    *tokens, last = run(talk())
    assert last == "last"
    assert merged(tokens) == merged([StepTokens([1], [2], [3, 4], ["x"]), many])


def test_tokens_that_come_together_are_merged_by_request() -> None:
    steps = [
        StepTokens([7, 8], [1, 2], [1, 2, 3], ["a", "b"]),
        StepTokens([8], [1], [4], [""]),
        StepTokens([9, 7], [1, 1], [5, 6], ["c", "d"]),
    ]
    assert merged(steps) == StepTokens([7, 8, 9], [2, 3, 1], [1, 6, 2, 3, 4, 5], ["ad", "b", "c"])
    assert merged(steps[:1]) is steps[0]


@pytest.mark.parametrize("older", ["client", "server"])
def test_processes_of_an_older_version_are_talked_to_as_they_talk(
    run: Any, monkeypatch: pytest.MonkeyPatch, older: str
) -> None:
    async def talk() -> list[str]:
        name = secrets.token_hex(8)
        async with serving_locally(name, echo, pb.AbortRequest.FromString):
            if older == "client":
                link = await local_link._connect(name, kinds=False)
            else:
                monkeypatch.setattr(local_link, "_WITH_KINDS", "/not there")
                link = await connect_locally(name)
            assert link is not None
            assert not link.kinds
            link.send(pb.AbortRequest(request_id="x"))
            return await Got(link).until(2)

    assert run(talk()) == ["hello", "x"]


def test_the_handler_ends_with_its_client_and_the_link_with_its_server(run: Any) -> None:
    async def talk() -> None:
        ended = asyncio.Event()

        async def handler(requests: AsyncIterator[Any], _: LocalLink) -> AsyncIterator[Any]:
            try:
                async for request in requests:
                    yield request
            finally:
                ended.set()

        name = secrets.token_hex(8)
        async with serving_locally(name, handler, pb.AbortRequest.FromString):
            first = await connect_locally(name)
            second = await connect_locally(name)
            assert first is not None
            assert second is not None
            got = Got(first)
            first.send(pb.AbortRequest(request_id="x"))
            await got.until(1)
            first.abort()
            await ended.wait()
            assert not second.lost.done()
        await second.lost
        second.send(pb.AbortRequest(request_id="x"))  # to nobody
        second.send_tokens(StepTokens([1], [1], [1], ["x"]))
        assert await connect_locally(name) is None

    run(talk())


def test_a_client_that_reads_nothing_is_given_up_and_costs_no_more_than_buffers(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_link, "SLOW_READER_S", 0.2)
    given = 0

    async def handler(_: AsyncIterator[Any], __: LocalLink) -> AsyncIterator[Any]:
        nonlocal given
        while True:
            given += 1
            yield pb.AbortRequest(request_id="x" * 100_000)

    async def talk() -> None:
        name = secrets.token_hex(8)
        async with serving_locally(name, handler, pb.AbortRequest.FromString):
            link = await connect_locally(name)
            assert link is not None
            link.read_on(wanted=False)
            await asyncio.sleep(0.1)
            before = given
            await asyncio.sleep(0.6)
            assert given == before < 100
            link.read_on(wanted=True)
            await link.lost

    run(talk())


def test_a_handler_that_reads_nothing_stops_its_client(run: Any) -> None:
    async def handler(_: AsyncIterator[Any], __: LocalLink) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async def talk() -> None:
        name = secrets.token_hex(8)
        async with serving_locally(name, handler, pb.AbortRequest.FromString):
            link = await connect_locally(name)
            assert link is not None
            sent = 0
            try:
                async with asyncio.timeout(0.5):
                    while True:
                        link.send(pb.AbortRequest(request_id="x" * 100_000))
                        sent += 1
                        await link.writable()
                        await asyncio.sleep(0)
            except TimeoutError:
                pass
            assert 0 < sent < 200
            link.abort()

    run(talk())


def test_processes_of_other_users_are_not_connected(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk() -> None:
        name = secrets.token_hex(8)
        async with serving_locally(name, echo, pb.AbortRequest.FromString):
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
            assert await connect_locally(name) is None
            monkeypatch.undo()
            link = await connect_locally(name)
            assert link is not None
            await Got(link).until(1)
            link.close()

    run(talk())


def test_a_message_that_is_too_large_ends_the_connection(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk() -> None:
        name = secrets.token_hex(8)
        async with serving_locally(name, echo, pb.AbortRequest.FromString):
            link = await connect_locally(name)
            assert link is not None
            monkeypatch.setattr(local_link, "MAX_MESSAGE_BYTES", 1000)
            link.send(pb.AbortRequest(request_id="x" * 5000))
            await link.lost

    run(talk())


@pytest.mark.parametrize("size", [1, 900, 1000, 1010, 1024, 5000])
def test_tokens_of_any_size_are_read_however_they_are_cut(run: Any, size: int) -> None:
    """Whole ones take a shorter way, and small ones begin with bytes that are made before."""
    step = StepTokens([7], [1], [3], ["x" * size])

    async def talk() -> None:
        written, got = list[bytes](), list[StepTokens]()
        writer, reader = LocalLink(kinds=True), LocalLink(kinds=True)
        writer._write = written.append
        reader.deliver(lambda _: pytest.fail("no message of tokens"), got.append)
        writer.send_tokens(step)
        (data,) = written
        for cut in (0, 1, 4, 5, 6, len(data) - 1):
            reader.data_received(data[:cut])
            reader.data_received(data[cut:])
        reader.data_received(data + data)
        assert merged(got) == merged([step] * 8)

    run(talk())
