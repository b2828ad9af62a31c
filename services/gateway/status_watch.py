"""The status of an answer, for those who say afterwards what became of a request."""

from typing import Final

from starlette.types import Message, Send

CLIENT_GONE: Final = 499
"""The status under which requests are counted whose client left."""


class StatusWatch:
    """``send`` that remembers the status; 499 if nothing was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = CLIENT_GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
