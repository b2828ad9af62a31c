"""The processes of a tensor-parallel group, seen from the leader.

The group works or it doesn't: when one rank dies or fails, the others are killed and whoever waits
gets ``GroupFailed``. A dead rank closes its socket, so that is noticed at once. One that hangs is
known by what the kernel says of it (``watch.py``), so that work may take as long as it takes.
"""

import asyncio
import math
import signal
import subprocess
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from precast.graphs.artifacts.versions import CRASH_SIGNALS
from precast.log import get_logger
from precast.system.shared_memory import remove_segment
from services.decode_worker.ranks.kv_memory import KvMemory
from services.decode_worker.ranks.launcher import ChildProcess, RankLauncher
from services.decode_worker.ranks.protocol import (
    Command,
    DecodeOn,
    DropGraph,
    GraphLoaded,
    Init,
    Join,
    Loaded,
    LoadGraph,
    Loading,
    Masks,
    Ping,
    Pong,
    RankFailed,
    Ready,
    Reply,
    Shutdown,
    StartSampling,
    Step,
    StepDone,
    frame,
)
from services.decode_worker.ranks.rank_link import RankLink
from services.decode_worker.ranks.sent_steps import SentSteps
from services.decode_worker.ranks.watch import HUNG_S, LOOK_S, Watch

log = get_logger(__name__)

SILENCE_S: Final = 300.0
"""Longest time without a word of a rank that loads: a layer read, cut and packed."""
JOIN_TIMEOUT_S: Final = 60.0
LOAD_GRAPH_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 3.0

_R = TypeVar("_R", bound=Reply)
_T = TypeVar("_T")


class GroupFailed(Exception):
    """A rank died, failed or did not answer in time; its text says which and why."""


class RankRefused(GroupFailed):
    """A rank said why it can't serve: another one would say the same."""


class FilesChanged(GroupFailed):
    """Ranks have loaded other files than those that serve: no group would go on with these."""


class RankGroup:
    """``tp`` rank processes. Made by ``start``; every method may raise GroupFailed."""

    def __init__(self) -> None:
        self._ranks: list[RankLink] = []
        self._processes: list[ChildProcess] = []
        self._group_id = ""
        self._model_dir = Path()
        self._weights: dict[str, int] = {}
        """Names and sizes of the model's files when the ranks began to read them."""
        self._stopping = False
        self._refused = False
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, as soon as the group can't go on."""
        self.ready: tuple[Ready, ...] = ()
        self._heard = time.monotonic()
        self.sent_steps = SentSteps(self._pids, self.fail)

    @classmethod
    async def start(
        cls, inits: Sequence[Init], launcher: RankLauncher, memory: KvMemory
    ) -> "RankGroup":
        """Takes one process for each Init and waits until all have loaded their shard, however long
        that takes. Their KV caches lie in ``memory``, and have what it has."""
        group = cls()
        group._group_id = inits[0].group_id
        group._model_dir = Path(inits[0].model_dir)
        group._weights = _weight_sizes(group._model_dir)
        try:
            for index in range(len(inits)):
                await group._connect(index, launcher)
            for rank, init, file in zip(group._ranks, inits, memory.files, strict=True):
                rank.send_with(frame(init), file)
            await group._answers(Loaded, math.inf, silence_s=SILENCE_S)
            group._broadcast(Join())
            group.ready = tuple(await group._answers(Ready, JOIN_TIMEOUT_S))
        except BaseException:
            await group.stop()
            raise
        return group

    def fail(self, reason: str, *, refused: bool = False) -> None:
        if not self.failed.done() and not self._stopping:
            self._refused = refused
            self.failed.set_result(reason)
            self.sent_steps.end()

    def failure(self) -> GroupFailed:
        """Why the group, which has failed, can't go on."""
        return (RankRefused if self._refused else GroupFailed)(self.failed.result())

    def _on_reply(self, rank: RankLink, reply: Reply) -> None:
        if isinstance(reply, RankFailed):
            self.fail(f"rank {rank.index}: {reply.message}", refused=reply.refused)
        elif isinstance(reply, Loading):
            self._come_further(reply)
        else:
            rank.replies.put_nowait(reply)

    def _come_further(self, loading: Loading) -> None:
        self._heard = time.monotonic()
        log.debug("rank loads", rank=loading.tp_rank, done=loading.done, total=loading.total)

    async def ping(self) -> None:
        """Returns once every rank has answered; for when there is nothing else to do."""
        self._broadcast(Ping())
        await self._answers(Pong, HUNG_S)

    def send_step(
        self, step: Step | DecodeOn, sampling: Sequence[StartSampling] = (), *, timeout_s: float
    ) -> None:
        """Behind those that are under way. ``sampling``: of sequences that draw for the first time.

        Doesn't raise: a group that has failed says so to whoever waits for the answer.
        """
        frames = b"".join(frame(message) for message in (*sampling, step))
        for rank in self._ranks:
            rank.send(frames)
        self.sent_steps.add(timeout_s)

    def send_frames(self, frames: bytes, timeout_s: float) -> None:
        """``send_step`` of one that is in frames already, while others are under way."""
        for rank in self._ranks:
            rank.send(frames)
        self.sent_steps.add_behind(timeout_s)

    def send_masks(self, masks: Masks) -> None:
        """Of the oldest step under way. Doesn't raise, as ``send_step``."""
        data = frame(masks)
        for rank in self._ranks:
            rank.send(data)

    async def step_done(self) -> StepDone:
        """Rank 0's answer to the oldest step under way. What it answered before the group failed is
        given first."""
        done = await self.sent_steps.done()
        if done is None:
            raise self.failure()
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
        if "SIGBUS" in names.values():
            self._tell_cut_files([rank for rank, name in names.items() if name == "SIGBUS"])
        return {index: name for index, name in names.items() if name in CRASH_SIGNALS}

    def _tell_cut_files(self, ranks: Sequence[int]) -> None:
        """A rank dies of SIGBUS when a file becomes shorter while it is mapped."""
        now = _weight_sizes(self._model_dir)
        changed = [name for name, size in self._weights.items() if now.get(name) != size]
        log.error(
            "ranks died of SIGBUS: memory is gone that they had mapped",
            ranks=ranks,
            model=str(self._model_dir),
            changed_files=changed,
        )

    async def stop(self) -> None:
        """Ends the processes, by force where they don't follow, and removes their segment."""
        orderly = not self.failed.done()
        self._stopping = True
        self.sent_steps.close()
        for rank in self._ranks:
            if orderly and rank.is_open:
                rank.send(frame(Shutdown()))
        if not orderly:
            self._kill()
        await asyncio.to_thread(self._reap)
        for rank in self._ranks:
            rank.close()
        remove_segment(self._group_id)

    def _broadcast(self, command: Command) -> None:
        if self.failed.done():
            raise self.failure()
        data = frame(command)
        for rank in self._ranks:
            rank.send(data)

    async def _connect(self, index: int, launcher: RankLauncher) -> None:
        process, connection = await launcher.take()
        self._processes.append(process)
        loop = asyncio.get_running_loop()
        rank = RankLink(index, connection, self.sent_steps.answered, self._on_reply, self.fail)
        await loop.create_unix_connection(lambda: rank, sock=connection)
        self._ranks.append(rank)

    async def _answers(
        self, kind: type[_R], timeout_s: float, *, silence_s: float = math.inf
    ) -> list[_R]:
        gathered = asyncio.gather(*(rank.replies.get() for rank in self._ranks))
        replies = await self._within(gathered, timeout_s, kind.__name__, silence_s)
        wrong = [type(r).__name__ for r in replies if not isinstance(r, kind)]
        if wrong:
            raise GroupFailed(f"expected {kind.__name__}, got {wrong[0]}")
        return [reply for reply in replies if isinstance(reply, kind)]

    async def _within(
        self, answer: Awaitable[_T], timeout_s: float, what: str, silence_s: float = math.inf
    ) -> _T:
        waiter = asyncio.ensure_future(answer)
        try:
            await self._until_done(waiter, timeout_s, what, silence_s)
            if waiter.done():
                return waiter.result()
            raise self.failure()
        finally:
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)

    async def _until_done(
        self, waiter: "asyncio.Future[_T]", timeout_s: float, what: str, silence_s: float
    ) -> None:
        """Waits until the answer is there or the group has failed, which it does if it hangs."""
        self._heard = begun = time.monotonic()
        watch: Watch | None = None
        either: set[asyncio.Future[Any]] = {waiter, self.failed}
        while True:
            left = timeout_s - (time.monotonic() - begun)
            await asyncio.wait(
                either, timeout=min(LOOK_S, left), return_when=asyncio.FIRST_COMPLETED
            )
            if waiter.done() or self.failed.done():
                return
            now = time.monotonic()
            if now - begun >= timeout_s:
                self.fail(f"no answer to {what} within {timeout_s:g} s")
            elif now - self._heard >= silence_s:
                self.fail(f"no word of {what} for {silence_s:g} s")
            elif watch is None:  # most answers come sooner: looking would cost each step
                watch = Watch(self._pids())
            elif (hung := watch.hung()) is not None:
                self.fail(f"{hung}, with {what} to answer")

    def _pids(self) -> list[int]:
        return [process.pid for process in self._processes]

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


def _weight_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
