"""Gateways and who starts models for them, over a real socket."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from precast.errors import ModelNotFound, Overloaded, PrecastError, WorkerUnavailable
from precast.rpc.model_link import ListedModel, ModelLink, serving_models

DEADLINE_S = 10.0
LISTED = ListedModel(name="a", created=1, context_length=64)


class _Held:
    def __init__(self, host: "Host") -> None:
        self._host = host
        host.held += 1

    def release(self) -> None:
        self._host.held -= 1


class Host:
    """Gives a model once its gate is open."""

    def __init__(self) -> None:
        self.held = 0
        self.asked = 0
        self.gate = asyncio.Event()
        self.error: PrecastError | None = None

    async def hold(self, model: str, wait_s: float) -> _Held:
        self.asked += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return _Held(self)

    async def models(self) -> Sequence[ListedModel]:
        return [LISTED]


def new_name() -> str:
    return f"test-{secrets.token_hex(8)}"


@asynccontextmanager
async def linked(name: str) -> AsyncIterator[ModelLink]:
    link = ModelLink(name)
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0.005)


async def test_a_model_is_held_until_it_is_released() -> None:
    host, name = Host(), new_name()
    host.gate.set()
    async with serving_models(name, host), linked(name) as link:
        first, second = await link.hold("a", 5), await link.hold("a", 5)
        assert host.held == 2
        link.release(first)
        await until(lambda: host.held == 1)
        assert list(await link.models()) == [LISTED]
        link.release(second)
        await until(lambda: host.held == 0)


async def test_what_a_gateway_held_ends_with_it_and_so_does_what_it_waits_for() -> None:
    host, name = Host(), new_name()
    host.gate.set()
    async with serving_models(name, host):
        async with linked(name) as link:
            await link.hold("a", 5)
            host.gate.clear()
            waiting = asyncio.create_task(link.hold("b", 5))
            await until(lambda: host.asked == 2)
        await until(lambda: host.held == 0)
        host.gate.set()
        async with linked(name) as link:
            await link.hold("a", 5)
        await until(lambda: host.held == 0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_request_that_leaves_is_forgotten() -> None:
    host, name = Host(), new_name()
    async with serving_models(name, host), linked(name) as link:
        waiting = asyncio.create_task(link.hold("a", 5))
        await until(lambda: host.asked)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        host.gate.set()
        number = await link.hold("b", 5)  # behind what was said before
        assert host.held == 1
        link.release(number)


async def test_held_models_are_held_again_at_a_host_that_came_back() -> None:
    name, first, second = new_name(), Host(), Host()
    first.gate.set()
    second.gate.set()
    async with linked(name) as link:
        async with serving_models(name, first):
            number = await link.hold("a", 5)
        await until(lambda: not link.connected)
        assert first.held == 0
        async with serving_models(name, second):
            await until(lambda: second.held == 1)
            link.release(number)
            await until(lambda: second.held == 0)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ModelNotFound("no such"), ModelNotFound),
        (Overloaded("too many"), Overloaded),
        (WorkerUnavailable("busy"), WorkerUnavailable),
    ],
)
async def test_errors_keep_their_kind_and_text(
    raised: PrecastError, kind: type[PrecastError]
) -> None:
    host, name = Host(), new_name()
    host.error = raised
    host.gate.set()
    async with serving_models(name, host), linked(name) as link:
        with pytest.raises(kind, match=str(raised)):
            await link.hold("a", 5)


async def test_nobody_waits_for_a_host_that_is_not_there_for_longer_than_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("precast.rpc.model_link._MARGIN_S", 0.05)
    async with linked(new_name()) as link:
        with pytest.raises(WorkerUnavailable, match="did not answer"):
            await link.hold("a", 0.05)


async def test_a_stop_ends_all_waits() -> None:
    host, name = Host(), new_name()
    async with serving_models(name, host), linked(name) as link:
        waiting = asyncio.create_task(link.hold("a", 50))
        await until(lambda: host.asked)
        link.end(WorkerUnavailable("stopping"))
        with pytest.raises(WorkerUnavailable, match="stopping"):
            await waiting


async def test_nonsense_ends_a_connection_and_no_other() -> None:
    host, name = Host(), new_name()
    host.gate.set()
    async with serving_models(name, host), linked(name) as link:
        number = await link.hold("a", 5)
        reader, writer = await asyncio.open_unix_connection(f"\0precast-{name}")
        writer.write(b'{"what": "everything"}\n')
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        writer.close()
        assert host.held == 1
        link.release(number)
