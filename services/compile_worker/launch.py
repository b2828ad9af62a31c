"""Runs a capture that ends whole: ``python launch.py LIFELINE_FD STATUS_FD NICE CPUS COMMAND...``.

CPUS are the ids of those that it may use, with commas between; "" means all.

A capture starts compilers, which start more processes. All of them share this process's group,
which is killed, this process included, when the command has ended (its exit code is written to
STATUS_FD first) or when the compile worker dies: it holds the other end of the lifeline, which
then closes. Standard library only: this file runs as a script, for every capture.
"""

import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

OOM_SCORE = "800"
"""Should the machine run out of memory, the kernel takes a capture first."""


def main(arguments: Sequence[str]) -> None:
    """Start the command as a child in our group. Does not return."""
    lifeline, status, nice, cpus, *command = arguments
    os.nice(int(nice))
    if cpus:
        os.sched_setaffinity(0, map(int, cpus.split(",")))
    with suppress(OSError):  # some sandboxes have a read-only /proc
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child = subprocess.Popen(command)
    if ended_first(child, int(lifeline)):
        os.write(int(status), str(child.wait()).encode())
    os.killpg(0, signal.SIGKILL)


def ended_first(child: subprocess.Popen[bytes], lifeline: int) -> bool:
    """Wait until the child has ended (true) or the compile worker has (false)."""
    ended = os.pidfd_open(child.pid)
    readable, _, _ = select.select([ended, lifeline], [], [])
    return lifeline not in readable


if __name__ == "__main__":
    main(sys.argv[1:])
