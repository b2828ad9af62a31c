"""The machine's physical cores, as sysfs describes them: sockets, nodes, caches, kinds of core.

What the kernel or a container hides is replaced by the plainest guess, and named in ``missing``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys")
_EFFICIENT_PMUS: Final = ("cpu_atom", "cpu_lowpower")
"""Performance counters that Intel's efficiency cores have, and performance cores don't."""
_SPEEDS: Final = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")
_SLOWEST_PERFORMANCE: Final = 0.85
"""Of the fastest core's speed: favoured cores are up to 10 % faster than others of their kind, and
efficiency cores have 75 % at the most."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """A physical core."""

    cpus: tuple[int, ...]
    """Ids of its hardware threads, ascending."""
    package: int = 0
    node: int = 0
    l3: int = 0
    """Lowest id of the CPUs that share its L3 cache."""
    efficient: bool = False
    """An E core of a machine that has P cores too."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    cores: tuple[Core, ...]
    """Online, by node, L3 cache and id."""
    missing: tuple[str, ...] = ()
    """What could not be read, and what is assumed instead."""


def read_topology(root: Path, fallback: Iterable[int]) -> Topology:
    """The topology under ``root`` (``/sys``). ``fallback``: the CPUs that there are if sysfs
    doesn't say."""
    cpus = read_cpu_list(root / "devices/system/cpu/online")
    if not cpus:
        lone = tuple(Core(cpus=(cpu,)) for cpu in sorted(fallback))
        return Topology(cores=lone, missing=("no topology in sysfs: each CPU counts as a core",))
    missing: list[str] = []
    siblings = {cpu: _siblings(root, cpu) for cpu in cpus}
    if not all(siblings.values()):
        missing.append("no SMT siblings in sysfs: each CPU counts as a core")
    nodes = _nodes(root)
    if not nodes:
        missing.append("no nodes in sysfs: all CPUs count as one node's")
    efficient = _efficient(root, cpus)
    cores = {
        Core(
            cpus=siblings[cpu] or (cpu,),
            package=_number(_cpu(root, cpu) / "topology/physical_package_id") or 0,
            node=nodes.get(cpu, 0),
            l3=_l3(root, cpu),
            efficient=cpu in efficient,
        )
        for cpu in cpus
    }
    order = sorted(cores, key=lambda core: (core.node, core.l3, core.cpus))
    return Topology(cores=tuple(order), missing=tuple(missing))


def read_cpu_list(path: Path) -> tuple[int, ...]:
    """CPU ids of a file such as ``0-27,56-83``; none if it is empty, broken or not there."""
    try:
        return parse_cpu_list(path.read_text())
    except (OSError, ValueError):
        return ()


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU ids in the kernel's list format, ascending. Raises ``ValueError``."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(cpus))


def cpu_list(cpus: Iterable[int]) -> str:
    """The reverse: ``0-27,56-83``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cpu(root: Path, cpu: int) -> Path:
    return root / f"devices/system/cpu/cpu{cpu}"


def _siblings(root: Path, cpu: int) -> tuple[int, ...]:
    """Hardware threads of the CPU's core; the second name is that of kernels before 5.3."""
    topology = _cpu(root, cpu) / "topology"
    named = (read_cpu_list(topology / f"{name}_list") for name in ("core_cpus", "thread_siblings"))
    return next(filter(None, named), ())


def _nodes(root: Path) -> Mapping[int, int]:
    """Node of each CPU. Nodes without CPUs, which only have memory, don't matter here."""
    return {
        cpu: int(path.parent.name.removeprefix("node"))
        for path in sorted(root.glob("devices/system/node/node[0-9]*/cpulist"))
        for cpu in read_cpu_list(path)
    }


def _l3(root: Path, cpu: int) -> int:
    """Lowest CPU that shares the L3 cache; without one, all CPUs of the machine share nothing."""
    for level in _cpu(root, cpu).glob("cache/index[0-9]*/level"):
        if _number(level) == 3:
            return min(read_cpu_list(level.with_name("shared_cpu_list")), default=0)
    return 0


def _efficient(root: Path, cpus: Sequence[int]) -> frozenset[int]:
    """CPUs of efficiency cores: by performance counters, else by capacity, else by frequency."""
    slow = frozenset(
        cpu for pmu in _EFFICIENT_PMUS for cpu in read_cpu_list(root / f"devices/{pmu}/cpus")
    )
    for name in _SPEEDS:
        if slow:
            break
        speeds = {cpu: _number(_cpu(root, cpu) / name) or 0 for cpu in cpus}
        if min(speeds.values()) > 0:
            least = _SLOWEST_PERFORMANCE * max(speeds.values())
            slow = frozenset(cpu for cpu, speed in speeds.items() if speed < least)
    return slow if slow < frozenset(cpus) else frozenset()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
