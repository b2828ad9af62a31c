"""Work that takes only what others leave of the CPUs.

``SCHED_IDLE`` gives way at once to any other thread of the same scheduling group. Where the kernel
groups processes by session (autogroup), that says nothing of other sessions' threads, so the group
as a whole steps back too: its niceness, and an idle cgroup where this process may make one.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOWEST: Final = 19
_CGROUPS: Final = Path("/sys/fs/cgroup")
_PREFIX: Final = "precast-idle-"


def step_back(cgroups: Path = _CGROUPS) -> None:
    """Put this process, and all that it starts from now on, behind everybody else.

    To be called by the leader of a session that holds nothing else. What the machine doesn't allow
    is left out: at least the niceness is the lowest.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(_LOWEST)
    with suppress(OSError):  # kernels without autogroup
        Path("/proc/self/autogroup").write_text(str(_LOWEST))
    for parent in _own_cgroups(cgroups):
        if _enter_idle_cgroup(parent):
            return


def remove_idle_cgroups(cgroups: Path = _CGROUPS) -> None:
    """Remove what ``step_back`` made, where no process is left in it."""
    for parent in _own_cgroups(cgroups):
        for folder in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # in use, or gone
                folder.rmdir()


def _own_cgroups(cgroups: Path) -> Iterator[Path]:
    """Folders of this process's groups that may have a say in CPU time: of version 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        version_2 = controllers == ""
        if version_2 or "cpu" in controllers.split(","):
            root = cgroups if version_2 else cgroups / controllers
            folder = root / name.lstrip("/")
            if not folder.name.startswith(_PREFIX) and folder.is_dir():
                yield folder


def _enter_idle_cgroup(parent: Path) -> bool:
    """Whether this process is in an idle group below ``parent`` now."""
    folder = parent / f"{_PREFIX}{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "cpu.idle").write_text("1")
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with suppress(OSError):
            folder.rmdir()
        return False
    return True
