"""What a Generate stream still has to send.

Deltas of one request that the client has not read yet are merged, and a stream whose ended requests
are not read takes no new ones, so a slow reader costs a bounded amount of memory.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb

MAX_UNREAD_ENDINGS: Final = 1024


class Outbox:
    def __init__(self) -> None:
        self._deltas: dict[str, pb.TokenDelta] = {}
        self._endings: list[pb.GenerateResponse] = []
        self._heartbeat: pb.Heartbeat | None = None
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        """Set each time the client has taken what was waiting."""
        self._closed = False

    def delta(self, request_id: str, delta: pb.TokenDelta) -> None:
        """Adds tokens or text to what waits for this request."""
        waiting = self._deltas.get(request_id)
        if waiting is None:
            self._deltas[request_id] = delta
        else:
            waiting.MergeFrom(pb.TokenDelta(token_ids=delta.token_ids, logprobs=delta.logprobs))
            waiting.text += delta.text
        self._changed.set()

    def heartbeat(self, beat: pb.Heartbeat) -> None:
        """Sent before all that waits; in the place of one that was not read yet."""
        self._heartbeat = beat
        self._changed.set()

    def end(self, response: pb.GenerateResponse) -> None:
        """The last message of a request, sent after its deltas."""
        self._endings.append(response)
        self._changed.set()

    async def room(self) -> None:
        """Waits while too many ended requests are unread."""
        while len(self._endings) >= MAX_UNREAD_ENDINGS:
            self._read.clear()
            await self._read.wait()

    def close(self) -> None:
        """No message follows."""
        self._closed = True
        self._changed.set()

    async def responses(self) -> AsyncIterator[pb.GenerateResponse]:
        """Everything put in, in order for each request, until closed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            deltas, self._deltas = self._deltas, {}
            endings, self._endings = self._endings, []
            beat, self._heartbeat = self._heartbeat, None
            if beat is not None:
                yield pb.GenerateResponse(heartbeat=beat)
            for request_id, delta in deltas.items():
                yield pb.GenerateResponse(request_id=request_id, delta=delta)
            for ending in endings:
                yield ending
            self._read.set()
            if self._closed and not self._deltas and not self._endings:
                return
