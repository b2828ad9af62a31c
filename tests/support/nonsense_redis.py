"""Something else at Redis' port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

WORDS = (
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"!\xff\r\n",
    b"$x\r\n",
    b"*1\r\n:x\r\n",
    b"\xff\xfe\r\n",
)
"""What such servers say. A number that is none makes Redis' client raise what is no error of
Redis'."""


@asynccontextmanager
async def nonsense_redis(words: bytes) -> AsyncIterator[str]:
    """URL of a server that answers everything with ``words``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            writer.write(words)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()
