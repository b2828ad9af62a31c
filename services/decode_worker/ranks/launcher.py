"""Starts rank processes: as forks of a nursery, which has imported torch, or each afresh.

Light, so that the nursery can import torch while the leader still imports what it needs itself: 3
of the 5 seconds of a start. When ranks die, others are there at once.
"""

import asyncio
import socket
import subprocess
import sys
import threading
from typing import Final, NamedTuple

from precast.cli import head_start
from precast.log import get_logger
from precast.system.fork_server import ForkServer, Order
from precast.system.process import Child

log = get_logger(__name__)

RANK_MODULE: Final = "services.decode_worker.ranks.process"
NURSERY_MODULE: Final = "services.decode_worker.ranks.nursery"
NURSERY: Final = "precast rank-nursery"
ChildProcess = subprocess.Popen[bytes] | Child


class RankProcess(NamedTuple):
    process: ChildProcess
    connection: socket.socket


def nursery() -> ForkServer:
    """One that has begun already; a fork of this process if it has imported torch and has no
    threads; else a fresh one."""
    if (begun := head_start.taken(NURSERY_MODULE)) is not None:
        return begun
    ranks = sys.modules.get(NURSERY_MODULE)
    if ranks is not None and threading.active_count() == 1:
        return ForkServer.fork(ranks.main, NURSERY)
    return ForkServer.start(NURSERY_MODULE)


class RankLauncher:
    def __init__(self, module: str = RANK_MODULE, forks: ForkServer | None = None) -> None:
        """``module`` is run with ``--fd N``, its end of a stream socket, where there are no
        ``forks``."""
        self._module = module
        self._forks = forks

    async def take(self) -> RankProcess:
        """A rank that waits for its first command."""
        if self._forks is not None:
            try:
                # in a thread, because the nursery may still import torch
                return await asyncio.to_thread(self._fork, self._forks)
            except OSError as error:
                log.warning("no rank from the nursery; starting one afresh", reason=str(error))
                self._renew(self._forks)
        return self.start()

    def _renew(self, forks: ForkServer) -> None:
        """Another nursery for the ranks after this one, where the last one is gone."""
        if not forks.alive:
            forks.close()
            self._forks = ForkServer.start(NURSERY_MODULE)

    def close(self) -> None:
        """Ends the nursery."""
        if self._forks is not None:
            self._forks.close()

    def start(self) -> RankProcess:
        """One that is no fork, which waits for its first command."""
        # Not in a thread, and not one of asyncio's processes: with the thread that started it, be
        # it a child watcher's, a child would end. A fork and exec is all that blocks here.
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", self._module, "--fd", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return RankProcess(process=process, connection=ours)

    def _fork(self, forks: ForkServer) -> RankProcess:
        ours, theirs = socket.socketpair()
        order = Order(command_line=["precast", "rank", self._module])
        with theirs:
            try:
                return RankProcess(forks.spawn(order, [theirs.fileno()]), ours)
            except OSError:
                ours.close()
                raise
