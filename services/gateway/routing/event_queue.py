"""What one generation has received and its HTTP response hasn't sent yet.

The stream that fills it is shared by all requests of a worker, so filling never waits. It is
bounded by merging: once ``MAX_EVENTS`` deltas wait for a slow client, later ones are added to the
last. A slow client gets fewer, larger chunks, and costs no more memory than its own output.
"""

import asyncio
from collections import deque
from typing import Final

from precast.errors import PrecastError
from precast.proto.decode.v1.decode_service_pb2 import GenerationFinished, TokenDelta

MAX_EVENTS: Final = 64

Event = TokenDelta | GenerationFinished


class Inbox:
    """Events of one generation in order: deltas, then one finished or one error."""

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._end: GenerationFinished | PrecastError | None = None
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the worker is done with the request; deltas may still be here."""
        return self._end is not None

    def put(self, delta: TokenDelta) -> None:
        if self.ended:
            return
        if len(self._deltas) >= MAX_EVENTS:
            _append(self._deltas[-1], delta)
        else:
            self._deltas.append(delta)
        self._changed.set()

    def end(self, how: GenerationFinished | PrecastError) -> None:
        """The first end counts."""
        if self._end is None:
            self._end = how
            self._changed.set()

    async def get(self) -> Event:
        """The next event. Raises the error that ended the generation, after its deltas."""
        while not self._deltas and self._end is None:
            self._changed.clear()
            await self._changed.wait()
        if self._deltas:
            return self._deltas.popleft()
        assert self._end is not None
        if isinstance(self._end, PrecastError):
            raise self._end
        return self._end


def _append(target: TokenDelta, addition: TokenDelta) -> None:
    text = target.text + addition.text
    target.MergeFrom(addition)
    target.text = text
