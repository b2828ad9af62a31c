"""The process that tries grammars, seen from the worker."""

import asyncio
import socket
import subprocess
import sys
from typing import Final

from precast.errors import Unavailable
from services.decode_worker.constraints.checker import (
    CHECK_S,
    HEADER,
    Check,
    Setup,
    decode_answer,
    framed,
)
from services.decode_worker.constraints.grammar import Grammar

MODULE: Final = "services.decode_worker.constraints.checker"
ANSWER_S: Final = CHECK_S + 10.0
START_S: Final = 30.0
MAX_ANSWER_BYTES: Final = 1 << 16


class GrammarChecker:
    """One process; it tries one grammar at a time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """So that the first grammar need not wait for it. Raises Unavailable."""
        async with self._turn:
            await self._start()

    async def check(self, grammar: Grammar) -> str:
        """Why the grammar is refused; empty if it is not. Raises Unavailable if it can't be
        tried."""
        async with self._turn:
            await self._start()
            return await self._ask(Check(kind=grammar.kind, text=grammar.text), ANSWER_S)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._writer is not None:
            self._writer.close()

    async def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _process(theirs)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        if refused := await self._ask(self._setup, START_S):
            self.close()
            raise Unavailable(f"this model's outputs can't be constrained: {refused}")

    async def _ask(self, order: Setup | Check, timeout_s: float) -> str:
        assert self._reader is not None
        assert self._writer is not None
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(framed(order))
                await self._writer.drain()
                return await _answer(self._reader)
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            self.close()
            reason = type(error).__name__
            raise Unavailable(f"the process that tries constraints failed ({reason})") from None
        except asyncio.CancelledError:
            self.close()  # or its answer would be taken for the next one's
            raise


def _process(connection: socket.socket) -> "subprocess.Popen[bytes]":
    """Not in a thread, and not one of asyncio's: a child ends with the thread that started it."""
    command = [sys.executable, "-m", MODULE, "--fd", str(connection.fileno())]
    return subprocess.Popen(command, pass_fds=[connection.fileno()])


async def _answer(reader: asyncio.StreamReader) -> str:
    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    if size > MAX_ANSWER_BYTES:
        raise OSError(f"an answer of {size} bytes")
    return decode_answer(await reader.readexactly(size)).refusal
