"""The host of models: one start at a time, memory that holds, and whatever ends a process.

Processes are stand-ins, so that each can be held, ended or failed at the moment that matters; real
ones are in ``tests/integration/test_models_on_demand.py``.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from precast.cli.on_demand import host as host_module
from precast.cli.on_demand.host import ModelHost
from precast.cli.on_demand.parts import HomeAdapter, HomeModel, StartFailed
from precast.errors import ModelCorrupt, ModelNotFound, Overloaded, WorkerUnavailable
from precast.rpc.model_link import Hold
from precast.system.backoff import Backoff

DEADLINE_S = 30.0
SIZES = {"a": 4, "b": 4, "c": 4, "large": 9, "huge": 11}
BOUND = 10


class Process:
    """Ready, failed or ended when the test says so."""

    def __init__(self, machine: "Machine", model: HomeModel) -> None:
        self.machine = machine
        self.model = model
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.how = ""
        self.stopped = False
        machine.begin(self)

    def end(self, how: str) -> None:
        self.how = how
        self.ended.set()

    async def until_ready(self) -> None:
        if self.machine.automatic:
            self.ready.set()
        waits = [asyncio.ensure_future(one.wait()) for one in (self.ready, self.ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.ended.is_set():
            raise StartFailed(self.how)

    async def until_ended(self) -> str:
        await self.ended.wait()
        return self.how

    async def stop(self) -> None:
        await asyncio.sleep(0)
        if not self.stopped:
            self.stopped = True
            self.machine.running[self.model.name] -= 1
        self.ended.set()


@dataclass(kw_only=True)
class Machine:
    """What runs on it, with the memory that this takes."""

    automatic: bool = True
    """Whether processes are ready at once."""
    running: Counter[str] = field(default_factory=Counter)
    processes: list[Process] = field(default_factory=list)
    most: int = 0
    """Memory that was ever taken."""

    def begin(self, process: Process) -> None:
        self.running[process.model.name] += 1
        self.processes.append(process)
        assert self.running[process.model.name] == 1, "two starts of one model"
        self.most = max(self.most, sum(SIZES[name] * n for name, n in self.running.items()))

    @property
    def started(self) -> list[str]:
        return [process.model.name for process in self.processes]

    @property
    def up(self) -> set[str]:
        return {name for name, count in self.running.items() if count}


class Home:
    def __init__(self, adapters: dict[str, str]) -> None:
        """``adapters``: the model of each."""
        self.adapters = adapters

    async def find(self, name: str) -> HomeModel:
        if name == "broken":
            raise ModelCorrupt("tensor x is missing")
        base = self.adapters.get(name, name)
        if base not in SIZES:
            raise ModelNotFound(f"no model {name!r}")
        return HomeModel(
            name=base,
            created=1,
            context_length=8,
            kv_blocks=1,
            nbytes=SIZES[base],
            adapters=tuple(
                HomeAdapter(name=one, created=2, setting=one)
                for one, of in self.adapters.items()
                if of == base
            ),
        )

    async def all(self) -> list[HomeModel]:
        return [await self.find(name) for name in SIZES]


def make(
    machine: Machine,
    *,
    idle_s: float = 1000.0,
    start_s: float = 1000.0,
    adapters: dict[str, str] | None = None,
) -> ModelHost:
    return ModelHost(
        models=Home({} if adapters is None else adapters),
        start=lambda model: Process(machine, model),
        bound=BOUND,
        idle_s=idle_s,
        start_s=start_s,
    )


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0.001)


async def hold(host: ModelHost, model: str, wait_s: float = DEADLINE_S) -> Hold:
    return await host.hold(model, wait_s)


async def test_many_requests_start_a_model_once() -> None:
    machine = Machine(automatic=False)
    host = make(machine)
    asked = [asyncio.create_task(hold(host, "a")) for _ in range(20)]
    await until(lambda: machine.processes)
    assert not any(task.done() for task in asked)
    machine.processes[0].ready.set()
    await asyncio.gather(*asked)
    await hold(host, "a")
    assert machine.started == ["a"]
    await host.close()
    assert not machine.up


async def test_the_idle_model_used_longest_ago_makes_room_and_a_busy_one_never() -> None:
    machine = Machine()
    host = make(machine)
    first, second = await hold(host, "a"), await hold(host, "b")
    waiting = asyncio.create_task(hold(host, "c"))
    await asyncio.sleep(0.01)
    assert machine.up == {"a", "b"}  # both are busy
    second.release()
    third = await waiting
    assert machine.up == {"a", "c"}
    first.release()
    third.release()
    (await hold(host, "a")).release()  # c is now the older one
    (await hold(host, "b")).release()
    assert machine.up == {"a", "b"}
    assert machine.most <= BOUND
    await host.close()


async def test_a_request_waits_for_memory_up_to_its_deadline() -> None:
    machine = Machine()
    host = make(machine)
    kept = await hold(host, "large")
    with pytest.raises(WorkerUnavailable, match=r"No memory became free .*; in use by: large"):
        await hold(host, "a", 0.02)
    kept.release()
    await hold(host, "a")
    assert machine.up == {"a"}
    await host.close()


async def test_small_models_don_t_keep_a_large_one_out() -> None:
    machine = Machine()
    host = make(machine)
    small = await hold(host, "a")
    large = asyncio.create_task(hold(host, "large"))
    await asyncio.sleep(0.01)
    other = asyncio.create_task(hold(host, "b"))  # it would fit
    await asyncio.sleep(0.01)
    assert machine.up == {"a"}
    small.release()
    (await large).release()
    await other
    assert machine.started == ["a", "large", "b"]
    await host.close()


async def test_a_failed_start_is_told_with_its_reason_and_not_tried_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_module, "FAILURES", Backoff(first_s=0.6))
    machine = Machine(automatic=False)
    host = make(machine)
    asked = [asyncio.create_task(hold(host, "a")) for _ in range(3)]
    await until(lambda: machine.processes)
    machine.processes[0].end("weights: no such file")
    for task in asked:
        with pytest.raises(WorkerUnavailable, match="'a' could not be started: weights: no such"):
            await task
    with pytest.raises(WorkerUnavailable, match="weights: no such file"):
        await hold(host, "a")
    assert machine.started == ["a"]
    await until(lambda: not machine.up)
    machine.automatic = True
    await hold(host, "b")  # others are not concerned
    await asyncio.sleep(0.6)
    await hold(host, "a")
    assert machine.started == ["a", "b", "a"]
    await host.close()


async def test_a_start_that_hangs_is_given_up() -> None:
    machine = Machine(automatic=False)
    host = make(machine, start_s=0.05)
    with pytest.raises(WorkerUnavailable, match=r"was not ready within 0\.05 s"):
        await hold(host, "a")
    await until(lambda: not machine.up)
    await host.close()


async def test_what_can_t_be_served_is_told_at_once() -> None:
    host = make(Machine())
    with pytest.raises(ModelNotFound, match="The model 'x' does not exist"):
        await hold(host, "x")
    with pytest.raises(WorkerUnavailable, match="'broken' could not be started: tensor x is missi"):
        await hold(host, "broken")
    with pytest.raises(WorkerUnavailable, match="all models together may take"):
        await hold(host, "huge")


async def test_a_model_that_ends_is_started_again_for_those_that_need_it() -> None:
    machine = Machine()
    host = make(machine)
    held = await hold(host, "a")
    machine.processes[0].end("SIGKILL")
    await until(lambda: machine.started == ["a", "a"])
    second = await hold(host, "a")
    assert machine.up == {"a"}
    held.release()
    second.release()
    machine.processes[1].end("SIGKILL")
    await until(lambda: not machine.up)
    await asyncio.sleep(0.01)
    assert machine.started == ["a", "a"]  # nobody asks: it sleeps
    await host.close()


async def test_idle_models_go_to_sleep() -> None:
    machine = Machine()
    host = make(machine, idle_s=0.05)
    watching = asyncio.create_task(host.keep_watch())
    busy = await hold(host, "a")
    (await hold(host, "b")).release()
    await until(lambda: machine.up == {"a"})
    busy.release()
    await until(lambda: not machine.up)
    await hold(host, "a")
    assert machine.started == ["a", "b", "a"]
    watching.cancel()
    await host.close()


async def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MAX_WAITING", 2)
    host = make(Machine(automatic=False))
    waiting = [asyncio.create_task(hold(host, "a")) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="2 requests wait"):
        await hold(host, "b")
    await host.close()
    for task in waiting:
        with pytest.raises(WorkerUnavailable, match="shutting down"):
            await task


async def test_a_request_that_leaves_while_its_model_starts_holds_nothing() -> None:
    machine = Machine(automatic=False)
    host = make(machine)
    leaving = asyncio.create_task(hold(host, "large"))
    await until(lambda: machine.processes)
    leaving.cancel()
    machine.automatic = True
    machine.processes[0].ready.set()  # in the same turn
    await asyncio.gather(leaving, return_exceptions=True)
    await hold(host, "a")  # large was idle
    assert machine.up == {"a"}
    await host.close()


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_asked_memory_holds_and_everyone_is_answered(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "CRASHES", Backoff(first_s=0.001, max_s=0.001))
    chance, machine = random.Random(seed), Machine()
    host = make(machine)
    names = ["a", "b", "c", "large"]

    async def client() -> None:
        for _ in range(30):
            held = await hold(host, chance.choice(names))
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
            held.release()
            if chance.random() < 0.1 and machine.processes:
                chance.choice(machine.processes).end("SIGKILL")

    await asyncio.wait_for(asyncio.gather(*(client() for _ in range(8))), DEADLINE_S)
    assert machine.most <= BOUND
    assert set(machine.started) == set(names)
    await host.close()
    assert not machine.up


async def test_a_model_and_its_adapters_are_one() -> None:
    machine = Machine()
    host = make(machine, adapters={"x": "a", "y": "a"})
    held = [await hold(host, name) for name in ("x", "a", "y", "x")]
    assert machine.started == ["a"]
    other = await hold(host, "b")
    other.release()
    waiting = asyncio.create_task(hold(host, "c"))
    await until(lambda: machine.started == ["a", "b", "c"])  # b made room: a's adapters are in use
    (await waiting).release()
    for one in held:
        one.release()
    await hold(host, "b")
    listed = [(one.name, one.parent) for one in await host.models()]
    assert listed[:3] == [("a", ""), ("x", "a"), ("y", "a")]
    with pytest.raises(ModelNotFound, match="'z' does not exist"):
        await hold(host, "z")
    await host.close()


async def test_an_adapter_that_came_later_waits_until_its_model_is_idle() -> None:
    machine, adapters = Machine(), dict[str, str]()
    host = make(machine, adapters=adapters)
    busy = await hold(host, "a")
    adapters["x"] = "a"
    with pytest.raises(WorkerUnavailable, match="'x' came after its model 'a' had started"):
        await hold(host, "x", wait_s=0.02)
    waiting = asyncio.create_task(hold(host, "x"))
    await asyncio.sleep(0.01)
    assert machine.started == ["a"]
    busy.release()
    held = await waiting
    assert machine.started == ["a", "a"]
    again = await hold(host, "a")  # the same process
    assert machine.started == ["a", "a"]
    for one in (held, again):
        one.release()
    await host.close()
