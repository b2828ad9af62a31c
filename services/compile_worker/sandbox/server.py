"""A process that has imported all that captures need, and forks one for each order.

``python -m services.compile_worker.sandbox.server ORDERS PARENT IDLE CPUS PROGRAM ARGUMENT...``

ORDERS is a socket. Each message on it is an ``Order`` with one descriptor: the capture's end of a
stream, which is its stdout. On that stream the compile worker hears ``{"pid": N}`` first, then what
the capture says, then ``{"exit": CODE}`` when no process of the capture is left. Closing the other
end of the stream kills the capture; closing the other end of ORDERS, or the worker's death, ends
the server and all captures.

PROGRAM is a module with ``preload()``, which imports and warms up and leaves no thread, and
``main() -> int``, which is called in each fork with the ARGUMENTs and ``--out FOLDER`` as its
command line and the order's factors on stdin. CPUS are the ids of those that captures may use, with
commas between; "" means all. IDLE is "idle" for captures that get only what others leave of them.
"""

import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.system.background import step_back
from precast.system.process import ONE_THREAD, adopt_orphans, die_with_parent, fork, pin
from services.compile_worker.failures import STDERR_FILE
from services.compile_worker.sandbox import watchdog as guard

MAX_ORDER_BYTES: Final = 64 << 10
ENVIRONMENT: Final = {**ONE_THREAD, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Of a server. Threads would not help either: random weights for a verification took 1.3 s of
processor time where they take 0.14 s without."""
IDLE: Final = "idle"
OOM_SCORE: Final = "800"
"""Should the machine run out of memory, the kernel takes a capture first."""


@dataclass(frozen=True, kw_only=True)
class Order:
    factors: str
    """JSON."""
    folder: Path

    def to_bytes(self) -> bytes:
        return json.dumps([self.factors, str(self.folder)]).encode()

    @staticmethod
    def from_bytes(message: bytes) -> "Order":
        factors, folder = json.loads(message)
        return Order(factors=factors, folder=Path(folder))


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A capture that runs; its pid is also its group's."""

    pid: int
    pidfd: int
    talk: socket.socket


@dataclass(frozen=True, kw_only=True)
class Program:
    main: Callable[[], int]
    argv: Sequence[str]


def serve(orders: socket.socket, program: Program) -> None:
    """Until the orders end."""
    forks: list[Fork] = []
    try:
        while True:
            ends = [end for fork in forks for end in (fork.talk.fileno(), fork.pidfd)]
            ready, _, _ = select.select([orders.fileno(), *ends], [], [])
            for fork in [f for f in forks if {f.talk.fileno(), f.pidfd} & set(ready)]:
                forks.remove(fork)
                _finish(fork)
            if orders.fileno() in ready:
                message, descriptors, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, 1)
                if not message:
                    return
                talk = socket.socket(fileno=descriptors[0])
                forks.append(_fork(Order.from_bytes(message), talk, orders, forks, program))
    finally:
        for fork in forks:
            _finish(fork)


def _fork(
    order: Order,
    talk: socket.socket,
    orders: socket.socket,
    others: Sequence[Fork],
    program: Program,
) -> Fork:
    def child() -> int:
        orders.close()
        for other in others:
            other.talk.close()
            os.close(other.pidfd)
        return _capture(order, talk, program)

    pid = fork(child)
    with suppress(OSError):  # both do it, for neither knows who is first
        os.setpgid(pid, pid)
    return Fork(pid=pid, pidfd=os.pidfd_open(pid), talk=talk)


def _capture(order: Order, talk: socket.socket, program: Program) -> int:
    """In the fork: becomes a process of its own, and captures. Returns the exit code."""
    os.setpgid(0, 0)
    with suppress(OSError):  # some sandboxes have a read-only /proc
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    stderr = os.open(order.folder / STDERR_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stderr, 2)
    os.dup2(talk.fileno(), 1)
    _start_guard(talk)
    talk.close()
    # what compilers leave in TMPDIR goes with the folder, even after a SIGKILL
    os.environ["TMPDIR"] = tempfile.tempdir = str(order.folder)
    sys.stdout.write(json.dumps({"pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    sys.stdin = io.StringIO(order.factors)
    sys.argv = [*program.argv, "--out", str(order.folder)]
    return program.main()


def _start_guard(talk: socket.socket) -> None:
    me = os.pidfd_open(os.getpid())
    command = (sys.executable, "-I", "-S", guard.__file__, str(me), str(talk.fileno()))
    subprocess.Popen(command, pass_fds=(me, talk.fileno()), stdin=subprocess.DEVNULL)
    os.close(me)


def _finish(fork: Fork) -> None:
    """Kills what is left of a capture, reaps all of it and says how it ended."""
    with suppress(ProcessLookupError):
        os.killpg(fork.pid, signal.SIGKILL)  # its leader isn't reaped: the group is still its own
    code = 0
    with suppress(ChildProcessError):
        while True:  # the leader, and what the kernel gave to us when its parent died
            pid, status = os.waitpid(-fork.pid, 0)
            if pid == fork.pid:
                code = os.waitstatus_to_exitcode(status)
    os.close(fork.pidfd)
    with suppress(OSError), fork.talk:
        fork.talk.sendall(json.dumps({"exit": code}).encode() + b"\n")


def main() -> None:
    orders, parent, idle, cpus, name, *arguments = sys.argv[1:]
    die_with_parent(signal.SIGKILL, int(parent))
    adopt_orphans()
    if idle == IDLE:
        step_back()
    if cpus:
        pin(map(int, cpus.split(",")))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(name)
    module.preload()
    serve(socket.socket(fileno=int(orders)), Program(main=module.main, argv=[name, *arguments]))


if __name__ == "__main__":
    main()
