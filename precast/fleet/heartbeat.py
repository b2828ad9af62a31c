"""Keeps a worker's lease alive."""

import asyncio
from collections.abc import Callable
from typing import Final, Self

from precast.errors import RegistryUnavailable
from precast.fleet.leases import Lease, Registry
from precast.log import get_logger
from precast.system.backoff import Backoff
from precast.system.wakeup import Wakeup

log = get_logger(__name__)

HEARTBEAT_INTERVAL_S: Final = 2.0
"""What a worker does comes to gateways on their streams, each second; a lease says that it is there
and what it has, whose changes are published at once."""


class Heartbeat:
    """Publishes what ``make_record`` returns, every two seconds, until stopped.

    Outages of Redis are logged once and outlived; ``stop`` withdraws the lease. Use it as an async
    context manager or through ``start`` and ``stop``.
    """

    def __init__(
        self,
        registry: Registry,
        make_record: Callable[[], Lease],
        *,
        interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        self._registry = registry
        self._make_record = make_record
        self._interval_s = interval_s
        self._retry = Backoff(first_s=interval_s)
        self._wakeup = Wakeup()
        self._task: asyncio.Task[None] | None = None
        self._reachable = True

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="heartbeat")

    def publish_soon(self) -> None:
        """Publish now instead of at the next beat: readers should see a change at once."""
        self._wakeup.set()

    async def stop(self) -> None:
        """Stop beating and withdraw the lease. Bounded, and never fails."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            await self._registry.withdraw(self._make_record())
        except RegistryUnavailable as error:
            log.warning("lease not withdrawn; it will expire", reason=str(error))

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _run(self) -> None:
        while True:
            await self._beat()
            await self._wakeup.wait(self._pause_s())

    def _pause_s(self) -> float:
        """Up to the next beat: workers that have lost Redis together don't beat together."""
        return self._interval_s if self._reachable else self._retry.wait_s(1)

    async def _beat(self) -> None:
        try:
            await self._registry.publish(self._make_record())
        except RegistryUnavailable as error:
            if self._reachable:
                log.warning("registry lost; going on without it", reason=str(error))
            self._reachable = False
        except Exception:  # a broken record must not silently end the beats
            log.exception("heartbeat failed")
        else:
            if not self._reachable:
                log.info("registry is back; lease published again")
            self._reachable = True
