"""Child processes that never outlive their parent, and CPU ids.

``PR_SET_PDEATHSIG`` is the kernel's promise to signal a child when its parent dies, however it
dies. Python children ask for it first thing with ``die_with_parent``; other programs are started
through ``bound_to_parent``, because a ``preexec_fn`` may deadlock in a process with threads (gRPC
has many).

The promise is tied to the *thread* that started the child: start children from a thread that lives
as long as the process does.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

ONE_THREAD: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)
"""Environment of a process that forks: its libraries have no threads that a fork could miss."""


def die_with_parent(signum: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to send ``signum`` to this process when its parent dies.

    ``parent`` is the pid that the parent had when it started us: if it died before this call, the
    signal is sent now. Raises ``OSError`` where the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signum))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be waited for."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def bound_to_parent(
    command: Sequence[str], signum: signal.Signals = signal.SIGTERM
) -> tuple[str, ...]:
    """``command``, changed so that the process it starts gets ``signum`` when this process dies."""
    return (sys.executable, "-m", __name__, signum.name, str(os.getpid()), *command)


def fork(main: Callable[[], int]) -> int:
    """The pid of a fork that calls ``main`` for its exit code, and that dies with us.

    Only for a process that has no threads: a lock that another one holds would stay locked in the
    child. Raises ``OSError``.
    """
    parent = os.getpid()
    pid = os.fork()

    def child() -> int:
        die_with_parent(signal.SIGKILL, parent)
        return main()

    if pid == 0:
        end_with(child)
    return pid


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends a fork with what ``main`` returns or exits with."""
    code = 1
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # what the parent would do at its end is not the child's to do


class Child:
    """A child of this process, with what ``subprocess.Popen`` has for one."""

    def __init__(self, pid: int) -> None:
        """Raises ``OSError``; there is no child then."""
        self.returncode: int | None = None
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def fileno(self) -> int:
        """A descriptor that is readable once the child has ended, until ``poll`` says so."""
        return self._pidfd

    def poll(self) -> int | None:
        """The exit code, or the negated number of the signal that ended it; None: it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises ``subprocess.TimeoutExpired``."""
        if self.poll() is None:
            select.select([self._pidfd], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedChild(Child):
    """A fork of this process."""

    def __init__(self, main: Callable[[], int]) -> None:
        """As for ``fork``."""
        super().__init__(fork(main))


def available_cpus() -> tuple[int, ...]:
    """CPU ids that this process may run on, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU ids of a list such as ``0,2-3``. Raises ``ValueError`` with one line."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"not a list of CPU ids such as 0,2-3: {text!r}")
        cpus.extend(range(int(first), int(last or first) + 1))
    if not cpus or len(set(cpus)) != len(cpus):
        raise ValueError(f"a CPU id is missing or given twice: {text!r}")
    return tuple(cpus)


def pin(cpus: Iterable[int]) -> None:
    """Pin the calling thread, and all threads that it starts later, to these CPUs."""
    os.sched_setaffinity(0, set(cpus))


def _main(arguments: Sequence[str]) -> None:
    """``SIGNAL PARENT COMMAND...``: bind to the parent, then become the command."""
    name, parent, *command = arguments
    die_with_parent(signal.Signals[name], int(parent))
    os.execvp(command[0], command)  # noqa: S606  # PDEATHSIG survives an exec


if __name__ == "__main__":
    _main(sys.argv[1:])
