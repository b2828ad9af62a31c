"""Whether the client of a request is still there.

ASGI says so in a message for which a task has to wait. The server that runs here tells it where it
learns it, for no more than an entry in a set.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from starlette.types import Receive, Scope

_EXTENSION: Final = "precast.presence"


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Presence:
    """Of the client at the other end of one connection."""

    def __init__(self) -> None:
        self.gone = False
        self._watchers: set[Callable[[], None]] = set()

    def watch(self, on_gone: Callable[[], None]) -> None:
        self._watchers.add(on_gone)

    def unwatch(self, on_gone: Callable[[], None]) -> None:
        self._watchers.discard(on_gone)

    def end(self) -> None:
        """The client has gone."""
        self.gone = True
        for on_gone in list(self._watchers):
            on_gone()


def offer_presence(scope: Any, presence: Presence) -> None:
    """Lets the application find it."""
    scope["extensions"] = {**scope.get("extensions", {}), _EXTENSION: presence}


class WhileConnected:
    """``async with``: what is in it is cancelled when the client leaves, and ``ClientGone`` raised.
    The request's body must have been read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._presence: Presence | None = scope.get("extensions", {}).get(_EXTENSION)
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None
        """Where the server is another one."""
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "used outside of a task"
        self._task, self._cancelling = task, task.cancelling()
        if self._presence is None:
            self._watcher = asyncio.create_task(_disconnected(self._receive))
            self._watcher.add_done_callback(lambda _: self._cancel())
        elif self._presence.gone:
            raise ClientGone
        else:
            self._presence.watch(self._cancel)

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._presence is not None:
            self._presence.unwatch(self._cancel)
        gone = self._gone
        if self._watcher is not None and not self._watcher.done():
            self._gone = True  # its end cancels nothing any more
            self._watcher.cancel()
        if not gone:
            return
        is_last = self._task.uncancel() <= self._cancelling
        if is_last and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientGone

    def _cancel(self) -> None:
        if not self._gone:
            self._gone = True
            self._task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
