"""Takes a worker out of service, and back in."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from precast.errors import Overloaded, WrongState


class Draining:
    """Whether a worker admits requests, and which ones it has admitted."""

    def __init__(self, abort: Callable[[str], object], on_change: Callable[[], None]) -> None:
        """``abort`` ends the request of an id. ``on_change`` is called when requests are admitted
        no more, and when they are again."""
        self._abort = abort
        self._on_change = on_change
        self._running: set[str] = set()
        self._round = 0
        """Counts how often the worker went out of service or came back."""
        self._changed = asyncio.Event()
        self._stopping = False
        self.on = False

    def check(self) -> None:
        """Raises ``Overloaded`` unless requests are admitted."""
        if self.on:
            raise Overloaded("the worker is draining")

    def admitted(self, request_id: str) -> None:
        self._running.add(request_id)

    def ended(self, request_id: str) -> None:
        self._running.discard(request_id)
        self._changed.set()

    async def drain(self, deadline_s: float, *, stopping: bool = False) -> tuple[int, int]:
        """Admit nothing more and wait; how many requests finished and were aborted.

        ``stopping``: the process ends afterwards. Raises ``WrongState`` if the worker is taken
        back into service meanwhile: what runs then goes on.
        """
        self._stopping |= stopping
        if not self.on:
            self.on, self._round = True, self._round + 1
            self._on_change()
        before, this = len(self._running), self._round
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._running and self._round == this:
                    self._changed.clear()
                    await self._changed.wait()
        if self._round != this:
            raise WrongState("the worker was taken back into service before it was drained")
        left = list(self._running)
        for request_id in left:
            self._abort(request_id)
        return before - len(left), len(left)

    def undrain(self) -> bool:
        """Admit requests again; whether the worker was out of service. Raises ``WrongState`` if its
        process is about to end."""
        if self._stopping:
            raise WrongState("the worker is stopping; start it again instead")
        was, self.on = self.on, False
        self._round += was
        self._changed.set()
        self._on_change()
        return was
