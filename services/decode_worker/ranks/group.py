"""The processes of a tensor-parallel group, seen from the leader.

The group works or it doesn't: when one rank dies or fails, the others are killed and whoever waits
gets ``GroupFailed``. A dead rank closes its socket, so that is noticed at once and not by a
time-out.
"""

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

from precast.graphs.artifacts.versions import CRASH_SIGNALS
from precast.log import get_logger
from precast.system.shared_memory import remove_segment
from services.decode_worker.ranks.launcher import ChildProcess, RankLauncher
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Command,
    DropGraph,
    GraphLoaded,
    Init,
    LoadGraph,
    RankFailed,
    Ready,
    Reply,
    Shutdown,
    Step,
    StepDone,
    decode_reply,
    frame,
)

log = get_logger(__name__)

START_TIMEOUT_S: Final = 120.0
LOAD_GRAPH_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 3.0

_R = TypeVar("_R", bound=Reply)
_T = TypeVar("_T")


class GroupFailed(Exception):
    """A rank died, failed or did not answer in time; its text says which and why."""


class _Rank(asyncio.Protocol):
    """One rank's connection: frames in, and one waiter for the next."""

    def __init__(self, group: "RankGroup", index: int) -> None:
        self._group = group
        self._index = index
        self._buffer = bytearray()
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= FRAME_HEADER.size:
            (size,) = FRAME_HEADER.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                self._group.fail(f"rank {self._index} sent a frame of {size} bytes")
                return
            end = FRAME_HEADER.size + size
            if len(self._buffer) < end:
                return
            reply = decode_reply(bytes(self._buffer[FRAME_HEADER.size : end]))
            del self._buffer[:end]
            if isinstance(reply, RankFailed):
                self._group.fail(f"rank {self._index}: {reply.message}")
            else:
                self._replies.put_nowait(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._group.fail(f"rank {self._index} died")

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def reply(self) -> Reply:
        return await self._replies.get()


class RankGroup:
    """``tp`` rank processes. Made by ``start``; every method may raise GroupFailed."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._processes: list[ChildProcess] = []
        self._group_id = ""
        self._stopping = False
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, as soon as the group can't go on."""
        self.ready: tuple[Ready, ...] = ()

    @classmethod
    async def start(cls, inits: Sequence[Init], launcher: RankLauncher) -> "RankGroup":
        """Takes one process for each Init and waits until all have loaded their shard."""
        group = cls()
        group._group_id = inits[0].group_id
        try:
            for index in range(len(inits)):
                await group._connect(index, launcher)
            for rank, init in zip(group._ranks, inits, strict=True):
                rank.send(frame(init))
            group.ready = tuple(await group._answers(Ready, START_TIMEOUT_S))
        except BaseException:
            await group.stop()
            raise
        return group

    def fail(self, reason: str) -> None:
        if not self.failed.done() and not self._stopping:
            self.failed.set_result(reason)

    def send_step(self, step: Step) -> None:
        self._broadcast(step)

    async def step_done(self, timeout_s: float) -> StepDone:
        """Rank 0's answer to the step sent last."""
        done = await self._within(self._ranks[0].reply(), timeout_s, "step")
        if not isinstance(done, StepDone):
            raise GroupFailed(f"rank 0 answered a step with {type(done).__name__}")
        return done

    async def load_graph(self, command: LoadGraph) -> list[GraphLoaded]:
        self._broadcast(command)
        return await self._answers(GraphLoaded, LOAD_GRAPH_TIMEOUT_S)

    def drop_graph(self, num_tokens: int, *, trial: bool = False) -> None:
        self._broadcast(DropGraph(num_tokens=num_tokens, trial=trial))

    def crashed(self) -> dict[int, str]:
        """After ``stop``: the signal of each rank that its own native code has ended."""
        names = {
            index: signal.Signals(-process.returncode).name
            for index, process in enumerate(self._processes)
            # a rank that was dying already when we killed it keeps its own signal
            if process.returncode is not None and process.returncode < 0
        }
        return {index: name for index, name in names.items() if name in CRASH_SIGNALS}

    async def stop(self) -> None:
        """Ends the processes, by force where they don't follow, and removes their segment."""
        orderly = not self.failed.done()
        self._stopping = True
        for rank in self._ranks:
            if orderly and rank.transport is not None and not rank.transport.is_closing():
                rank.send(frame(Shutdown()))
        if not orderly:
            self._kill()
        await asyncio.to_thread(self._reap)
        for rank in self._ranks:
            if rank.transport is not None:
                rank.transport.close()
        remove_segment(self._group_id)

    def _broadcast(self, command: Command) -> None:
        if self.failed.done():
            raise GroupFailed(self.failed.result())
        data = frame(command)
        for rank in self._ranks:
            rank.send(data)

    async def _connect(self, index: int, launcher: RankLauncher) -> None:
        # Not asyncio's processes: its child watcher would reap ranks from a thread that may be
        # gone, and a fork and exec is all that blocks here.
        process, connection = launcher.take()
        self._processes.append(process)
        loop = asyncio.get_running_loop()
        rank = _Rank(self, index)
        await loop.create_unix_connection(lambda: rank, sock=connection)
        self._ranks.append(rank)

    async def _answers(self, kind: type[_R], timeout_s: float) -> list[_R]:
        gathered = asyncio.gather(*(rank.reply() for rank in self._ranks))
        replies = await self._within(gathered, timeout_s, kind.__name__)
        wrong = [type(r).__name__ for r in replies if not isinstance(r, kind)]
        if wrong:
            raise GroupFailed(f"expected {kind.__name__}, got {wrong[0]}")
        return [reply for reply in replies if isinstance(reply, kind)]

    async def _within(self, answer: Awaitable[_T], timeout_s: float, what: str) -> _T:
        waiter = asyncio.ensure_future(answer)
        either: set[asyncio.Future[Any]] = {waiter, self.failed}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if waiter.done() and not waiter.cancelled():
            return waiter.result()
        waiter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiter
        if not self.failed.done():
            self.fail(f"no answer to {what} within {timeout_s:g} s")
        raise GroupFailed(self.failed.result())

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _reap(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
