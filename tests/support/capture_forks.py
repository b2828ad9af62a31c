"""Real captures as forks of a process that has preloaded, one for a whole test run.

A capture server imports and warms up for 8 s of processor time, and the suite would start some
twenty. ``precast serve`` in tests, and tests of the server itself, have real ones.

``python -m tests.support.capture_forks OWNER PATH`` is the process that forks, for as long as the
process OWNER lives. Who connects to the socket PATH sends an order with three descriptors, which
become stdin, stdout and stderr; the answer is the exit code. If it leaves before that, the capture
is killed. ``main`` here is a capture program (see ``services.compile_worker.sandbox.server``) that
orders from the process at the path of its first argument.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from precast.system.process import ONE_THREAD, fork
from tests.support.forked import ISA, ROOT

_MAX_BYTES: Final = 128 << 10
_START_S: Final = 200.0
PROGRAM: Final = "precast.graphs.capture.entry:main"
_SOCKET: Final = "orders"


def path() -> Path:
    """Of the socket whose captures have the kernels that this environment chooses. All workers of
    a run share the process behind it, which the first one starts."""
    return _path(os.environ.get(ISA, ""))


@functools.cache
def _path(isa: str) -> Path:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return _start(os.getpid(), Path(tempfile.mkdtemp(prefix="captures-")))
    folder = Path(tempfile.gettempdir()) / f"captures-{run}-{isa}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another worker's, which starts or has started it
        return folder / _SOCKET
    return _start(os.getppid(), folder)


def _start(owner: int, folder: Path) -> Path:
    """Nobody's child: what it forks for others is none of what this process has started."""
    command = [sys.executable, "-m", __name__, str(owner), str(folder / _SOCKET)]
    environment = {**os.environ, **ONE_THREAD}
    subprocess.run(["sh", "-c", '"$@" &', "sh", *command], cwd=ROOT, env=environment, check=True)
    return folder / _SOCKET


def preload() -> None:
    """Nothing: that is what this is for."""


def main() -> int:
    """A capture elsewhere."""
    orders, *arguments = sys.argv[1:]
    with tempfile.TemporaryFile("w+") as factors:
        factors.write(sys.stdin.read())
        factors.seek(0)
        return order(orders, arguments, (factors.fileno(), 1, 2))


def order(
    orders: str, arguments: Sequence[str], descriptors: Sequence[int], program: str = PROGRAM
) -> int:
    """The exit code of a capture with the instruction set that the process at ``orders`` has.
    ``program`` is a ``module:function``."""
    with _connect(orders) as connection:
        message = {"command": [program, *arguments], "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors))
        return int(connection.recv(64) or b"1")


def _connect(orders: str) -> socket.socket:
    """To the process that forks, which may still import."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end = time.monotonic() + _START_S
    while True:
        try:
            connection.connect(orders)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return connection


def _become(message: Mapping[str, Any], descriptors: Sequence[int]) -> int:
    os.setpgid(0, 0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(message["environment"])
    tempfile.tempdir = None  # where TMPDIR says now
    sys.argv = message["command"]
    module, _, function = sys.argv[0].partition(":")
    return int(getattr(importlib.import_module(module), function)())


def _serve(listener: socket.socket, owner: int) -> None:
    """Until the process behind the descriptor ``owner`` has ended."""
    running: dict[socket.socket, int] = {}
    """The process of each connection; 0: none yet."""
    while True:
        pidfds = {os.pidfd_open(pid): connection for connection, pid in running.items() if pid}
        ready, _, _ = select.select([owner, listener, *running, *pidfds], [], [])
        if owner in ready:
            return
        for pidfd, connection in pidfds.items():
            if pidfd in ready and connection not in ready:
                _finish(connection, running.pop(connection))
            os.close(pidfd)
        for connection in [one for one in ready if one in running]:
            _hear(connection, running, listener)
        if listener in ready:
            connection, _ = listener.accept()
            running[connection] = 0


def _hear(
    connection: socket.socket, running: dict[socket.socket, int], listener: socket.socket
) -> None:
    """An order, or that the other end has left."""
    message, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 3)
    if message:

        def child() -> int:
            for one in (listener, *running):
                one.close()
            return _become(json.loads(message), descriptors)

        running[connection] = fork(child)
        for descriptor in descriptors:
            os.close(descriptor)
        return
    pid = running.pop(connection)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _finish(connection, pid)
    connection.close()


def _finish(connection: socket.socket, pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its compilers
    with contextlib.suppress(OSError), connection:
        connection.send(str(code).encode())


def serve(owner: int, orders: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pidfd = os.pidfd_open(owner)
        _preload()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(orders))
        listener.listen()
        _serve(listener, pidfd)
    finally:
        shutil.rmtree(orders.parent, ignore_errors=True)


def _preload() -> None:
    from precast.graphs.capture import entry

    gc.disable()
    entry.preload()
    gc.enable()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
