"""What ``ps`` shows of a process."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOM: Final = " " * 2048
"""An argument that leaves its process, and forks of it, room for longer command lines."""
_ARGUMENTS: Final = slice(45, 47)
"""Where they begin and end, in ``/proc/self/stat`` behind the name (proc(5))."""


def set_command_line(arguments: Sequence[str]) -> None:
    """Show these arguments as the command line, cut where they are longer than the first ones.

    A fork would show the command line of the process that it was forked from.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = map(int, fields[_ARGUMENTS])
    size = end - start
    if start == 0 or size <= 1:  # the kernel doesn't say
        return
    shown = b"\0".join(map(os.fsencode, arguments))[: size - 1]
    ctypes.memmove(start, shown.ljust(size, b"\0"), size)
