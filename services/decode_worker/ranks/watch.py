"""Whether rank processes get on with what they were told to do, as the kernel sees it.

A rank computes in native code and can't say that it is alive meanwhile. But it uses processor time,
or waits for one or for a disk. One that is stopped, or a group in which nobody does any of that,
has hung.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

HUNG_S: Final = 7.0
LOOK_S: Final = 1.0
_BUSY: Final = frozenset("RD")
_STOPPED: Final = frozenset("Tt")


class _Look(NamedTuple):
    state: str
    ticks: int
    """Processor time so far, of all threads."""


class Watch:
    """Look at processes once a second while they have something to do."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        now = time.monotonic()
        self._looked = now
        self._last = [_look(pid) for pid in pids]
        self._ran = [now for _ in pids]
        """When each was last seen not to be stopped."""
        self._worked = now
        """When any was last seen to work."""

    def hung(self) -> str | None:
        """What is wrong, in words; None: they get on."""
        now = time.monotonic()
        if now - self._looked > 2 * LOOK_S:  # we were kept from looking: perhaps they were too
            late = now - self._looked
            self._worked += late
            self._ran = [at + late for at in self._ran]
        self._looked = now
        looks = [_look(pid) for pid in self._pids]
        for index, look in enumerate(looks):
            if look is None or look.state not in _STOPPED:
                self._ran[index] = now
            if look is None or look.state in _BUSY or look != self._last[index]:
                self._worked = now
        self._last = looks
        return self._verdict(now)

    def _verdict(self, now: float) -> str | None:
        for index, at in enumerate(self._ran):
            if now - at >= HUNG_S:
                return f"rank {index} is stopped"
        if now - self._worked >= HUNG_S:
            return f"the ranks have done nothing for {HUNG_S:g} s"
        return None


def _look(pid: int) -> _Look | None:
    """None where the kernel doesn't say, which is no sign of a fault."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return _Look(fields[0], int(fields[11]) + int(fields[12]))
    except (OSError, ValueError, IndexError):
        return None
