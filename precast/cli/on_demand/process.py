"""A model's decode worker, as a child of ``serve``."""

import asyncio
import contextlib
from typing import Final

from precast.cli.forks import Forks
from precast.cli.logs import last_line
from precast.cli.on_demand.parts import StartFailed
from precast.cli.supervisor import Child, ChildSpec, kill, run_once
from precast.errors import RegistryUnavailable
from precast.fleet.leases import Registry

STOP_S: Final = 15.0
"""For a worker to end; it drains, though nothing should run there. What is left then is killed."""
_LOOK_S: Final = 0.03
"""How often Redis is asked whether one that starts is ready."""


class WorkerProcess:
    """From its start to its end; ``precast.cli.on_demand.parts.ModelProcess``."""

    def __init__(
        self,
        model: str,
        spec: ChildSpec,
        forks: Forks,
        registry: Registry,
        children: list[Child],
    ) -> None:
        """Starts it. ``children``: where it is listed while it runs."""
        self._model = model
        self._child = Child(spec=spec)
        self._registry = registry
        self._children = children
        self._running = asyncio.create_task(run_once(self._child, forks), name=spec.name)
        self._told_to_stop = False
        children.append(self._child)

    async def until_ready(self) -> None:
        while not await self._is_ready():
            await asyncio.wait([self._running], timeout=_LOOK_S)
            if self._running.done():
                raise StartFailed(self._how())

    async def until_ended(self) -> str:
        await asyncio.wait([self._running])
        return self._how()

    async def stop(self) -> None:
        if not self._told_to_stop:
            self._told_to_stop = True
            await self._until_it_has_begun()
            self._running.cancel()
        _, left = await asyncio.wait([self._running], timeout=STOP_S)
        if left:
            kill(self._child)
            await asyncio.wait(left)
        with contextlib.suppress(ValueError):
            self._children.remove(self._child)

    async def _is_ready(self) -> bool:
        """By its lease. Those of earlier processes of the model, which may have been killed, last
        for some seconds."""
        if (pid := self._child.pid) is None:
            return False
        try:
            leases = await self._registry.decode_workers()
        except RegistryUnavailable:
            return False
        mine = (pid, self._model, "ready")  # of two hosts at one Redis pids may be equal
        return any((lease.pid, lease.model, lease.state) == mine for lease in leases)

    async def _until_it_has_begun(self) -> None:
        """One that is being forked can't be told anything yet."""
        while self._child.pid is None and not self._running.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _how(self) -> str:
        """Its own last words, or the signal that ended it."""
        if not self._running.cancelled() and (error := self._running.exception()):
            return f"{type(error).__name__}: {error}"
        code = 0 if self._running.cancelled() else self._running.result()
        return last_line(self._child.spec.log_path) if code > 0 else self._child.last_exit
