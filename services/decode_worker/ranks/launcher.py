"""Starts rank processes. Light, so that the first ones can import torch while their leader still
imports what it needs itself: 3 of the 5 seconds of a start.
"""

import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final, NamedTuple

from precast.system.process import ForkedChild

RANK_MODULE: Final = "services.decode_worker.ranks.process"
RankMain = Callable[[socket.socket], int]
ChildProcess = subprocess.Popen[bytes] | ForkedChild


class RankProcess(NamedTuple):
    process: ChildProcess
    connection: socket.socket


class RankLauncher:
    def __init__(self, module: str = RANK_MODULE) -> None:
        """``module`` is run with ``--fd N``, its end of a stream socket."""
        self._module = module
        self._waiting: list[RankProcess] = []

    def start_early(self, count: int) -> None:
        """Starts ranks that ``take`` will give out."""
        self._waiting += [self._start() for _ in range(count)]

    def fork_early(self, count: int, main: RankMain) -> None:
        """The same, as forks of this process, which has imported what ``main`` needs and has no
        threads."""
        for _ in range(count):
            self._waiting.append(self._fork(main))

    def take(self) -> RankProcess:
        """A rank that waits for its first command."""
        return self._waiting.pop(0) if self._waiting else self._start()

    def close(self) -> None:
        """Ends those that nobody took."""
        for rank in self._waiting:
            rank.process.kill()
            rank.process.wait()
            rank.connection.close()
        self._waiting.clear()

    def _start(self) -> RankProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", self._module, "--fd", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return RankProcess(process=process, connection=ours)

    def _fork(self, main: RankMain) -> RankProcess:
        ours, theirs = socket.socketpair()
        others = [rank.connection for rank in self._waiting]

        def child() -> int:
            for connection in (ours, *others):  # the leader's ends
                connection.close()
            return main(theirs)

        with theirs:
            return RankProcess(process=ForkedChild(child), connection=ours)
