"""Starts models that requests ask for, and stops those that nobody uses.

All decisions are made here, in one event loop: there is one start of a model at a time, whichever
gateways ask for it, and between a model's last release and its stop no request can slip in.
A model that is wanted waits in a queue until its memory is there: first come, first served, so that
small models don't keep a large one out. A model has its adapters with it: whoever asks for one of
them asks for the model. One that was added since the model has started is there once it starts
again, which it does as soon as no request holds it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from precast.cli.on_demand.eviction import fits, to_evict
from precast.cli.on_demand.parts import (
    Failure,
    HomeModel,
    ModelProcess,
    Models,
    Resident,
    StartFailed,
    State,
    Waiter,
)
from precast.errors import ModelNotFound, Overloaded, PrecastError, WorkerUnavailable
from precast.log import get_logger
from precast.rpc.model_link import ListedModel
from precast.system.backoff import Backoff
from precast.system.free_memory import gib

log = get_logger(__name__)

MAX_WAITING: Final = 512
"""Requests that wait for models to start; more are refused."""
START_S: Final = 600.0
"""Longest start. Large models are packed in their first one."""
FAILURES: Final = Backoff(first_s=1.0, max_s=60.0)
"""After failed starts in a row: requests meanwhile get the last one's error."""
CRASHES: Final = Backoff(first_s=0.2, max_s=5.0)
"""Before each restart of a model that ended while requests needed it, but the first in a row."""
SETTLED_S: Final = 30.0
"""A model that ran so long starts again at once."""
STOPPING: Final = "The server is shutting down."
_T = TypeVar("_T")


class _Hold:
    def __init__(self, host: "ModelHost", resident: Resident) -> None:
        self._host = host
        self._resident = resident

    def release(self) -> None:
        self._resident.release()
        self._host.look()


class ModelHost:
    """Its methods are called in one event loop."""

    def __init__(
        self,
        *,
        models: Models,
        start: Callable[[HomeModel], ModelProcess],
        bound: int,
        idle_s: float,
        start_s: float = START_S,
    ) -> None:
        """``bound``: bytes that all models together may take. ``idle_s``: a model that no request
        holds for so long is stopped. ``start_s``: the longest start."""
        self._models = models
        self._start = start
        self._bound = bound
        self._idle_s = idle_s
        self._start_s = start_s
        self._residents: dict[str, Resident] = {}
        self._waiting: list[Waiter] = []
        self._failures: dict[str, Failure] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._closing = False

    async def hold(self, model: str, wait_s: float) -> _Hold:
        """As ``precast.rpc.model_link.Host``."""
        resident = self._serving(model)
        if resident is not None:
            resident.use()
        else:
            resident = await self._wait_for(model, await self._found(model), wait_s)
        return _Hold(self, resident)

    async def models(self) -> list[ListedModel]:
        return [listed for one in await self._models.all() for listed in _listed(one)]

    async def keep_watch(self) -> None:
        """Stops models that have been idle for long, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 4))
            before = time.monotonic() - self._idle_s
            for resident in list(self._residents.values()):
                if resident.idle and resident.last_used <= before:
                    log.info("model goes to sleep", model=resident.model.name, idle_s=self._idle_s)
                    resident.leave()

    async def close(self) -> None:
        """Stops all models at once and ends all waits. The processes have ended when it returns."""
        self._closing = True
        for waiter in self._waiting:
            waiter.refuse(WorkerUnavailable(STOPPING))
        for resident in self._residents.values():
            resident.leave()
        await asyncio.gather(*self._lives, return_exceptions=True)

    def look(self) -> None:
        """Something changed: give those what they wait for that can have it, oldest first."""
        for waiter in self._waiting:
            self._settle(waiter)
        for waiter in self._waiting:
            wants_start = not waiter.granted.done() and waiter.model.name not in self._residents
            if wants_start and not self._make_room(waiter.model):
                return  # nobody takes the memory that it waits for

    def _serving(self, name: str) -> Resident | None:
        """The model of this name, or of the adapter that has it, if it can be asked."""
        ready = (one for one in self._residents.values() if one.state is State.READY)
        return next((one for one in ready if one.model.serves(name)), None)

    async def _found(self, name: str) -> HomeModel:
        """Raises as ``hold`` where waiting would not help."""
        try:
            model = await self._models.find(name)
        except PrecastError as error:
            raise _told(name, error) from None
        if self._closing:
            raise WorkerUnavailable(STOPPING)
        if model.nbytes > self._bound:
            raise WorkerUnavailable(
                f"The model {name!r} needs {gib(model.nbytes)} of memory; all models together may "
                f"take {gib(self._bound)}."
            )
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(f"{len(self._waiting)} requests wait for models to start already.")
        return model

    async def _wait_for(self, name: str, model: HomeModel, wait_s: float) -> Resident:
        granted: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        waiter = Waiter(name=name, model=model, granted=granted)
        self._waiting.append(waiter)
        try:
            self.look()
            async with asyncio.timeout(wait_s):
                return await waiter.granted
        except BaseException as error:
            if (resident := waiter.took()) is not None:
                resident.release()
            if isinstance(error, TimeoutError):
                raise WorkerUnavailable(self._why(waiter, wait_s)) from None
            raise
        finally:
            self._waiting.remove(waiter)
            self.look()

    def _why(self, waiter: Waiter, wait_s: float) -> str:
        """What a request has waited for in vain."""
        model = waiter.model
        resident = self._residents.get(model.name)
        if resident is not None and not resident.model.serves(waiter.name):
            return (
                f"The adapter {waiter.name!r} came after its model {model.name!r} had started, "
                f"which was in use for {wait_s:g} s."
            )
        if resident is not None:
            return f"The model {model.name!r} was not ready within {wait_s:g} s; it is starting."
        return (
            f"No memory became free for the model {model.name!r} within {wait_s:g} s; in use by: "
            f"{', '.join(self._residents)}."
        )

    def _settle(self, waiter: Waiter) -> None:
        """Grants or refuses what can be told now."""
        name = waiter.model.name
        resident, failure = self._residents.get(name), self._failures.get(name)
        if waiter.granted.done():
            return
        if resident is not None and resident.state is State.READY:
            if resident.model.serves(waiter.name):
                resident.use()
                waiter.granted.set_result(resident)
            elif resident.idle:
                log.info("model starts again", model=name, adapter=waiter.name)
                resident.leave()
        elif failure is not None and failure.left_s > 0:
            waiter.refuse(_start_failed(name, failure.reason))

    def _make_room(self, model: HomeModel) -> bool:
        """Whether its start has begun; else models have been told to go, or all are busy."""
        occupants = [one.occupant() for one in self._residents.values()]
        if self._closing:
            return False
        if fits(model.nbytes, self._bound, occupants):
            self._residents[model.name] = resident = Resident(model=model)
            life = asyncio.create_task(self._live(resident), name=f"model {model.name}")
            self._lives.add(life)
            life.add_done_callback(self._lives.discard)
            return True
        for name in to_evict(model.nbytes, self._bound, occupants) or ():
            log.info("model makes room", model=name, wanted=model.name)
            self._residents[name].leave()
        return False

    async def _live(self, resident: Resident) -> None:
        """A model's time in memory: one process, and others after it while requests need it."""
        try:
            while not resident.told_to_stop.is_set():
                await self._run(resident)
                if not resident.holds:
                    break
                resident.state = State.STARTING
                await self._pause(resident)
        except Exception:  # a defect: the model can be started again
            log.exception("a model's life ended unexpectedly", model=resident.model.name)
        finally:
            del self._residents[resident.model.name]
            self.look()

    async def _run(self, resident: Resident) -> None:
        process = self._start(resident.model)
        try:
            if await self._becomes_ready(resident, process):
                await self._until_over(resident, process)
        except StartFailed as error:
            self._failed(resident, str(error))
        finally:
            await process.stop()

    async def _becomes_ready(self, resident: Resident, process: ModelProcess) -> bool:
        """False if it was told to stop before. Raises ``StartFailed``."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._start_s):
                await _unless(resident.told_to_stop, process.until_ready())
        except TimeoutError:
            raise StartFailed(f"it was not ready within {self._start_s:g} s") from None
        if resident.told_to_stop.is_set():
            return False
        self._failures.pop(resident.model.name, None)
        resident.state, resident.last_used = State.READY, time.monotonic()
        start_s = round(time.monotonic() - begun, 2)
        log.info("model ready", model=resident.model.name, start_s=start_s)
        self.look()
        return True

    async def _until_over(self, resident: Resident, process: ModelProcess) -> None:
        """Until it ends, or is told to."""
        began = time.monotonic()
        how = await _unless(resident.told_to_stop, process.until_ended())
        if how is None:
            return
        settled = time.monotonic() - began > SETTLED_S
        resident.crashes = 1 if settled else resident.crashes + 1
        name = resident.model.name
        log.warning("a model's worker ended", model=name, how=how, requests=resident.holds)

    async def _pause(self, resident: Resident) -> None:
        """Before another start for those that hold the model still."""
        failure = self._failures.get(resident.model.name)
        left_s = failure.left_s if failure else CRASHES.wait_s(resident.crashes - 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await resident.told_to_stop.wait()

    def _failed(self, resident: Resident, reason: str) -> None:
        """All that wait for the model are told, and so are those that come soon."""
        name, before = resident.model.name, self._failures.get(resident.model.name)
        count = before.count + 1 if before else 1
        log.error("model failed to start", model=name, reason=reason, failures=count)
        until = time.monotonic() + FAILURES.wait_s(count)
        self._failures[name] = Failure(reason=reason, count=count, until=until)
        for waiter in self._waiting:
            if waiter.model.name == name:
                waiter.refuse(_start_failed(name, reason))


def _listed(model: HomeModel) -> list[ListedModel]:
    """It and its adapters."""
    length, names = model.context_length, [(model.name, model.created, "")]
    names += [(one.name, one.created, model.name) for one in model.adapters]
    return [
        ListedModel(name=name, created=created, context_length=length, parent=parent)
        for name, created, parent in names
    ]


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What the work gives; None if ``stop`` is set first. Raises what it raises."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _told(model: str, error: PrecastError) -> PrecastError:
    """What the client is told of a model that is not there, or can't be served."""
    if isinstance(error, ModelNotFound):
        return ModelNotFound(f"The model {model!r} does not exist.")
    return _start_failed(model, str(error))


def _start_failed(model: str, reason: str) -> WorkerUnavailable:
    return WorkerUnavailable(f"The model {model!r} could not be started: {reason}")
