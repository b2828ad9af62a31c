"""Runs a capture so that it can be killed whole: ``python launch.py LIFELINE_FD NICE COMMAND...``.

A capture starts compilers, which start more processes. All of them share this process's group. The
compile worker holds the other end of the lifeline; when it dies, however it dies, the pipe closes and
the whole group is killed. Standard library only: this file runs as a script, for every capture.
"""

import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SIGNALLED = 128
"""Exit codes above this say which signal ended the command, as in a shell."""
OOM_SCORE = "800"
"""Should the machine run out of memory, the kernel takes a capture first."""


def main(arguments: Sequence[str]) -> int:
    """Start the command as a child in our group; its exit code."""
    lifeline, nice, *command = arguments
    os.nice(int(nice))
    Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child = subprocess.Popen(command)
    wait_for_either(child, int(lifeline))
    code = child.wait()
    return code if code >= 0 else SIGNALLED - code


def wait_for_either(child: subprocess.Popen[bytes], lifeline: int) -> None:
    """Return when the child has ended; kill the group, ourselves included, if the worker has."""
    ended = os.pidfd_open(child.pid)
    readable, _, _ = select.select([ended, lifeline], [], [])
    if lifeline in readable:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
