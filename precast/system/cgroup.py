"""Limits that control groups set for this process: CPU quota, CPU set and memory.

Both versions of cgroups, and machines that mix them. A limit of any parent holds as well as one's
own, so all groups up to the top of the mount are read. What a container's namespace hides above
that is unknown, but for the memory limit of version 1, whose ``memory.stat`` tells it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from precast.system.topology import read_cpu_list

ROOT: Final = Path("/")
_UNLIMITED: Final = 1 << 60
"""Version 1 has no word for "no limit": it gives the largest number of pages."""
_MEMBER: Final = re.compile(r"^(\d+):([^:\n]*):(/.*)$", re.MULTILINE)
_MOUNT: Final = re.compile(
    r"\d+ \d+ \S+ (?P<root>\S+) (?P<point>\S+) .*- cgroup(?P<two>2?) \S+ (?P<options>\S+)"
)
""""mountinfo", proc(5)."""


@dataclass(frozen=True, kw_only=True)
class CpuQuota:
    cpus: float
    """CPU seconds a second."""
    path: str
    """The file that says so."""


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    limit: int
    """Bytes."""
    used: int
    """Bytes that all processes of the group have now, without page cache that can be dropped."""
    path: str

    @property
    def headroom(self) -> int:
        return max(0, self.limit - self.used)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The tightest of each kind."""

    quota: CpuQuota | None = None
    cpuset: tuple[int, ...] = ()
    """CPU ids; empty: no group says."""
    memory: MemoryLimit | None = None


NO_LIMITS: Final = Limits()


class _Mount(NamedTuple):
    point: Path
    root: str
    """The group that is mounted there."""
    version: Literal[1, 2]
    controllers: frozenset[str]


class _Group(NamedTuple):
    folder: Path
    version: Literal[1, 2]


def read_limits(root: Path) -> Limits:
    """The limits of this process, as ``/proc`` and ``/sys`` under ``root`` describe them. What
    can't be read sets no limit."""
    memory = list(_groups(root, "memory"))
    quotas = [quota for group in _groups(root, "cpu") if (quota := _quota(root, group))]
    limits = [limit for group in memory for limit in _memory_limits(root, group)]
    return Limits(
        quota=min(quotas, key=lambda quota: quota.cpus, default=None),
        cpuset=next(filter(None, map(_cpuset, _groups(root, "cpuset"))), ()),
        memory=min(limits, key=lambda limit: limit.headroom, default=None),
    )


def cpus_paid_for() -> int:
    """How many processes at once this process's affinity and quota are enough for; 1 at least."""
    quota = read_limits(ROOT).quota
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, int(quota.cpus)) if quota else allowed)


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """This process's group for a controller, and its parents up to the top of the mount."""
    version, name = _membership(root, controller)
    mount = next(
        (
            mount
            for mount in _mounts(root)
            if mount.version == version and (version == 2 or controller in mount.controllers)
        ),
        None,
    )
    if mount is None or version is None:
        return
    folder = mount.point / _below(mount.root, name)
    if not folder.is_dir():  # a mount of another namespace than /proc speaks of
        folder = mount.point
    for path in (folder, *folder.parents):
        yield _Group(path, version)
        if path == mount.point:
            return


def _membership(root: Path, controller: str) -> tuple[Literal[1, 2] | None, str]:
    """Which version has the controller, and the name of our group there."""
    unified = None
    for number, controllers, name in _MEMBER.findall(_read(root / "proc/self/cgroup")):
        if controller in controllers.split(","):
            return 1, name
        if number == "0" and not controllers:
            unified = name
    return (2, unified) if unified is not None else (None, "")


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _read(root / "proc/self/mountinfo").splitlines():
        if found := _MOUNT.fullmatch(line):
            yield _Mount(
                point=root / _unescaped(found["point"]).lstrip("/"),
                root=_unescaped(found["root"]),
                version=2 if found["two"] else 1,
                controllers=frozenset(found["options"].split(",")),
            )


def _unescaped(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _below(mounted: str, name: str) -> str:
    """A group's path below the mounted one; the mounted one itself if it isn't there."""
    parent = mounted.rstrip("/") + "/"
    return name.removeprefix(parent) if name.startswith(parent) and ".." not in name else ""


def _quota(root: Path, group: _Group) -> CpuQuota | None:
    if group.version == 2:
        path = group.folder / "cpu.max"
        words = _read(path).split()
    else:
        path = group.folder / "cpu.cfs_quota_us"
        words = [_read(path).strip(), _read(group.folder / "cpu.cfs_period_us").strip()]
    if len(words) != 2 or not all(map(str.isdecimal, words)):  # "max", "-1", or not there
        return None
    return CpuQuota(cpus=int(words[0]) / max(1, int(words[1])), path=_shown(root, path))


def _cpuset(group: _Group) -> tuple[int, ...]:
    names = (
        ("cpuset.cpus.effective",)
        if group.version == 2
        else ("cpuset.effective_cpus", "cpuset.cpus")
    )
    return next(filter(None, (read_cpu_list(group.folder / name) for name in names)), ())


def _memory_limits(root: Path, group: _Group) -> Iterator[MemoryLimit]:
    stat = _statistics(group.folder / "memory.stat")
    names = ["memory.limit_in_bytes"]
    current, reclaimable = "memory.usage_in_bytes", "total_inactive_file"
    if group.version == 2:
        names = ["memory.max", "memory.high"]  # above the second, the group is all but stopped
        current, reclaimable = "memory.current", "inactive_file"
    used = max(0, _bytes(group.folder / current) - stat.get(reclaimable, 0))
    limits = [(name, _bytes(group.folder / name, _UNLIMITED)) for name in names]
    limits.append(("memory.stat", stat.get("hierarchical_memory_limit", _UNLIMITED)))
    for name, limit in limits:
        if limit < _UNLIMITED:
            yield MemoryLimit(limit=limit, used=used, path=_shown(root, group.folder / name))


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _bytes(path: Path, default: int = 0) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else default


def _shown(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"


def _read(path: Path) -> str:
    """Empty if it can't be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
