"""Services as forks of a process that has imported them: there in a tenth of the processor time.

A fresh decode worker takes 3.3 s of processor time until it is ready, most of it to import torch
twice, and the suite starts some two hundred. ``precast serve`` forks its services too.

``python -m tests.support.forked serve ORDERS`` is the process that forks. ORDERS is a socket: a
message for each fork, with the descriptors that become its stdout and stderr, and one to wait for
it. ``python -m tests.support.forked call PROGRAM ARGUMENTS...`` is what becomes of one.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from precast.system.process import ONE_THREAD, Child, die_with_parent, end_with
from precast.system.title import ROOM, set_command_line

ROOT: Final = Path(__file__).parents[2]
PRELOADED: Final = (
    "services.decode_worker.main",
    "services.decode_worker.ranks.nursery",
    "services.gateway.main",
    "tests.support.command",
    "tests.support.compile_worker",
    "tests.support.gateway_stack",
    "tests.support.parrot_worker",
)
ISA: Final = "PRECAST_NATIVE_ISA"
_MAX_BYTES: Final = 128 << 10
_PRELOAD_S: Final = 200.0
_COMMAND: Final = (sys.executable, "-m", "tests.support.forked")


class ForkedProcess(Child):
    """A child of the process that forks, as ours."""

    def __init__(self, forks: "Forks", pid: int) -> None:
        super().__init__(pid)
        self._forks = forks

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.returncode = self._forks.wait(self.pid)
            os.close(self._pidfd)
        return self.returncode


Process = subprocess.Popen[Any] | ForkedProcess


class Forks:
    """The process that forks, as its owner sees it."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(_PRELOAD_S)
        self.isa = os.environ.get(ISA)
        with theirs:
            self._process = subprocess.Popen(
                [*_COMMAND, "serve", str(theirs.fileno()), ROOM],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **ONE_THREAD},
            )

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], output: Sequence[int]
    ) -> ForkedProcess:
        order = {"command": list(command), "environment": dict(environment), "cwd": str(Path.cwd())}
        return ForkedProcess(self, self._ask(order, output))

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def _ask(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> int:
        socket.send_fds(self._orders, [json.dumps(message).encode()], list(descriptors))
        return int(self._orders.recv(64))


@functools.cache
def _forks() -> Forks:
    return Forks()


def start(
    program: str,
    arguments: Sequence[str],
    *,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """A process that ends with what ``program``, a ``module:function``, returns for the arguments.

    ``environment`` stands for ours. The kernels read the one variable of it that is of their
    loading, so a process that is to have another one is a fresh one.
    """
    environment, forks = environment or os.environ, _forks()
    stdout, stderr = stdout or sys.__stdout__, stderr or sys.__stderr__
    assert stdout is not None
    assert stderr is not None
    if environment.get(ISA) == forks.isa:
        output = [stdout.fileno(), stderr.fileno()]
        return forks.spawn([program, *arguments], environment, output)
    command = [*_COMMAND, "call", program, *arguments]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)


def _serve(orders: socket.socket) -> None:
    """Answers until the owner is gone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, _MAX_BYTES, 2)
        if not message:
            return
        given = json.loads(message)
        answer = _wait(given["wait"]) if "wait" in given else _fork(given, descriptors, orders)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(str(answer).encode())


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(order: Mapping[str, Any], descriptors: Sequence[int], orders: socket.socket) -> int:
    owner = os.getpid()
    pid = os.fork()
    if pid == 0:
        orders.close()
        end_with(lambda: _become(order, descriptors, owner))
    return pid


def _become(order: Mapping[str, Any], descriptors: Sequence[int], owner: int) -> int:
    die_with_parent(signal.SIGKILL, owner)
    for number, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    set_command_line([*_COMMAND, "call", *order["command"]])
    return call(*order["command"])


def call(program: str, *arguments: str) -> int:
    module, _, function = program.partition(":")
    code: int | None = getattr(importlib.import_module(module), function)(arguments)
    return code or 0


def serve(orders: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # or each fork's collector would walk, and copy, what was imported
    gc.enable()
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=orders))


if __name__ == "__main__":
    _, what, *given = sys.argv
    sys.exit(call(*given) if what == "call" else serve(int(given[0])))
