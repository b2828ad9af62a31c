"""How much memory this process and its children may still take."""

from dataclasses import dataclass
from pathlib import Path

from precast.system.cgroup import ROOT, read_limits


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    nbytes: int
    why: str
    """Whose limit it is, with its numbers."""


def free_memory(root: Path = ROOT) -> FreeMemory:
    """The least of what the host has and of what each control group leaves, as ``/proc`` and
    ``/sys`` under ``root`` describe them."""
    total, available = (_meminfo(root, name) for name in ("MemTotal", "MemAvailable"))
    host = FreeMemory(
        nbytes=available, why=f"{gib(available)} of the host's {gib(total)} are available"
    )
    limit = read_limits(root).memory
    if limit is None or limit.headroom >= available:
        return host
    why = f"{limit.path} allows {gib(limit.limit)}, {gib(limit.used)} of it are used"
    return FreeMemory(nbytes=limit.headroom, why=why)


def gib(nbytes: int) -> str:
    """As people read it: ``7.4 GiB``, ``512 MiB`` below one."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes >> 20} MiB"


def _meminfo(root: Path, name: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
