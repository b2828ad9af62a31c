"""A process that has imported what others need, and becomes them: a fork is there in milliseconds.

``python -m precast.system.fork_server ORDERS OWNER MODULE ROOM`` starts one afresh. MODULE has
``preload()``, which imports and leaves no thread, and ``main(arguments, descriptors) -> int``,
which is called in each fork.

A fork is handed over: it is forked twice, so that it becomes a child of the server's owner, who
waits for it and with whom it dies. It outlives the server. ORDERS is a socket with a message for
each fork and the descriptors that it gets; the server answers with the fork's pid.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from precast.system.alive import ENVIRONMENT
from precast.system.process import (
    ONE_THREAD,
    Child,
    ForkedChild,
    adopt_orphans,
    die_with_parent,
    end_with,
)
from precast.system.title import ROOM, set_command_line

Main = Callable[[Sequence[str], Sequence[int]], int]
PRELOAD_S: Final = 120.0
"""Longest wait for a server that imports."""
ANSWER_S: Final = 5.0
_ADOPTION_S: Final = 5.0
_MAX_BYTES: Final = 64 << 10
_MAX_DESCRIPTORS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Order:
    """A process to fork."""

    command_line: Sequence[str]
    """What is shown of it."""
    arguments: Sequence[str] = ()
    """What its ``main`` gets."""
    death_signal: int = signal.SIGKILL
    """What it gets when its owner dies."""
    log: bool = False
    """Whether its first descriptor is its stdout and stderr, in a session of its own."""
    alive: bool = False
    """Whether its last descriptor is for its heartbeats."""


class ForkServer:
    """A server as its owner sees it. May be used by several threads."""

    def __init__(self, process: "Child | subprocess.Popen[bytes]", orders: socket.socket) -> None:
        self._process = process
        self._orders = orders
        self._lock = threading.Lock()
        self._answer_s = PRELOAD_S

    @classmethod
    def start(cls, module: str) -> "ForkServer":
        """A fresh interpreter, which imports while we go on."""
        adopt_orphans()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(
                [*command, module, ROOM],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C goes to the owner alone
                env={**os.environ, **ONE_THREAD},
            )
        return cls(process, ours)

    @classmethod
    def fork(cls, main: Main, name: str) -> "ForkServer":
        """A fork of this process, which has imported what ``main`` needs and has no threads."""
        adopt_orphans()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner = os.getpid()

        def child() -> int:
            ours.close()
            set_command_line([name])
            return _serve(theirs, owner, main)

        with theirs:
            return cls(ForkedChild(child), ours)

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return self._orders.fileno() >= 0 and self._process.poll() is None

    def spawn(self, order: Order, descriptors: Sequence[int] = ()) -> Child:
        """A process, forked and ours. Raises ``OSError`` if the server can't; one that did not
        answer is gone then."""
        answer = self._ask(asdict(order), descriptors)
        if "pid" not in answer:
            raise OSError(f"can't fork: {answer.get('error')}")
        return Child(answer["pid"])

    def ping(self) -> None:
        """Raises ``OSError`` if the server doesn't answer in time."""
        self._ask({}, ())

    def close(self) -> None:
        """Ends the server; its forks go on."""
        self._process.kill()
        self._process.wait()
        self._orders.close()

    def _ask(self, message: Mapping[str, object], descriptors: Sequence[int]) -> dict[str, int]:
        with self._lock:
            try:
                answer = self._answer(message, descriptors)
            except OSError:
                # it is not asked again: a late answer would be taken for that to the next order
                self._process.kill()
                self._orders.close()
                raise
            self._answer_s = ANSWER_S
            parsed: dict[str, int] = json.loads(answer)
            return parsed

    def _answer(self, message: Mapping[str, object], descriptors: Sequence[int]) -> bytes:
        self._orders.settimeout(self._answer_s)
        socket.send_fds(self._orders, [json.dumps(message).encode()], list(descriptors))
        answer = self._orders.recv(_MAX_BYTES)
        if not answer:
            raise ConnectionResetError("the fork server has ended")
        return answer


def _serve(orders: socket.socket, owner: int, main: Main) -> int:
    """Answers until the owner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides when we end
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, _MAX_BYTES, _MAX_DESCRIPTORS)
        if not message:
            return 0
        given = json.loads(message)
        answer: dict[str, object] = {}
        if given:
            try:
                answer = {"pid": _hand_over(Order(**given), descriptors, orders, owner, main)}
            except OSError as error:
                answer = {"error": str(error)}
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(answer).encode())


def _hand_over(
    order: Order, descriptors: Sequence[int], orders: socket.socket, owner: int, main: Main
) -> int:
    """The pid of a fork that is the owner's child. Raises ``OSError``."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as found:
        try:
            middle = os.fork()
        except OSError:
            os.close(writing)
            raise
        if middle == 0:
            _fork_again(writing)
            os.close(writing)
            orders.close()
            found.close()
            end_with(lambda: _become(order, descriptors, owner, main))
        os.close(writing)
        os.waitpid(middle, 0)  # from now on the fork is the owner's
        pid = found.readline()
    if not pid:
        raise OSError("the second fork failed")
    return int(pid)


def _fork_again(writing: int) -> None:
    """Returns in the second fork; the first one ends."""
    try:
        pid = os.fork()
        if pid == 0:
            return
        os.write(writing, f"{pid}\n".encode())
    except OSError:
        os._exit(1)  # no pid: the server knows
    os._exit(0)


def _become(order: Order, descriptors: Sequence[int], owner: int, main: Main) -> int:
    end = time.monotonic() + _ADOPTION_S
    while os.getppid() != owner:
        if time.monotonic() > end:
            return 1  # the owner is gone
        time.sleep(0.001)
    die_with_parent(signal.Signals(order.death_signal), owner)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order.alive:
        os.environ[ENVIRONMENT] = str(descriptors[-1])
    set_command_line(order.command_line)
    if order.log:
        _use_log(descriptors[0])
    return main(order.arguments, descriptors)


def _use_log(log: int) -> None:
    os.setsid()
    for number in (1, 2):
        os.dup2(log, number)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def run(orders: int, owner: int, module: str) -> int:
    """The process of ``ForkServer.start``."""
    die_with_parent(signal.SIGKILL, owner)
    gc.disable()
    loaded = importlib.import_module(module)
    loaded.preload()
    gc.freeze()  # or each fork's collector would walk, and copy, what was imported
    gc.enable()
    set_command_line(["precast", "fork-server", module])
    with contextlib.suppress(ConnectionError):
        return _serve(socket.socket(fileno=orders), owner, loaded.main)
    return 0


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
