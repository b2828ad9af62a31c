"""Trees of ``/sys`` and ``/proc`` as Linux writes them, for machines that the tests don't run on.

They are built file by file, in the kernel's own form. ``RECORDED`` are real machines': what hwloc's
and util-linux's test suites hold of them, reduced to the files that are read here.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from precast.system.cgroup import NO_LIMITS, Limits
from precast.system.placement import Machine
from precast.system.topology import Topology, cpu_list, parse_cpu_list, read_topology

Files = Mapping[str, str]
"""Contents by path below the root."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A machine of equal cores. As on most, all first hardware threads are numbered before all
    second ones."""

    sockets: int = 1
    nodes_a_socket: int = 1
    caches_a_node: int = 1
    cores_a_cache: int
    smt: int = 2
    gib: int

    @property
    def cores(self) -> int:
        return self.sockets * self.nodes_a_socket * self.caches_a_node * self.cores_a_cache


XEON_2X28 = Server(sockets=2, cores_a_cache=28, gib=512)
"""Dual socket with SMT: 0-27,56-83 and 28-55,84-111."""
EPYC_64 = Server(nodes_a_socket=4, caches_a_node=2, cores_a_cache=8, gib=256)
"""One socket in NPS4: four nodes of two L3 caches of eight cores."""


def server_files(server: Server) -> Files:
    every = range(server.cores * server.smt)
    files = {
        "sys/devices/system/cpu/online": _list(every),
        "proc/meminfo": meminfo(server.gib),
    }
    for cpu in every:
        files |= _cpu_files(server, cpu)
    nodes = server.sockets * server.nodes_a_socket
    for node in range(nodes):
        cpus = _group(server, node, server.cores // nodes)
        files[f"sys/devices/system/node/node{node}/cpulist"] = _list(cpus)
    return files


RECORDED: Final[Mapping[str, Mapping[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "data/topologies.json").read_text()
)
"""By name: the source's name, CPUs that are on, CPUs of each node, and of each file of a CPU which
CPUs have which contents."""


def recorded_files(name: str) -> Files:
    found = RECORDED[name]
    files = {"sys/devices/system/cpu/online": f"{found['online']}\n"}
    for node, cpus in found["nodes"].items():
        files[f"sys/devices/system/node/{node}/cpulist"] = f"{cpus}\n"
    for path, contents in found["cpus"].items():
        for text, cpus in contents.items():
            for cpu in parse_cpu_list(cpus):
                files[f"sys/devices/system/cpu/cpu{cpu}/{path}"] = f"{text}\n"
    return files


def meminfo(gib: int, available: int | None = None) -> str:
    """The head of it; by default 15/16 of the memory is available."""
    total = gib << 20
    left = total - total // 16 if available is None else available << 20
    return (
        f"MemTotal:       {total:8} kB\nMemFree:        {left // 2:8} kB\n"
        f"MemAvailable:   {left:8} kB\nBuffers:           81920 kB\n"
    )


def laptop_files() -> Files:
    """Six fast cores of two threads each, numbered side by side, then eight slow ones, which share
    an L2 cache in fours. Two of the fast cores may clock higher than the others."""
    fast, slow = range(12), range(12, 20)
    every = "0-19\n"
    files = {
        "sys/devices/system/cpu/online": every,
        "sys/devices/system/node/node0/cpulist": every,
        "proc/meminfo": meminfo(32),
    }
    for cpu in (*fast, *slow):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        core = [cpu - cpu % 2, cpu - cpu % 2 + 1] if cpu in fast else [cpu]
        level2 = core if cpu in fast else range(cpu - cpu % 4, cpu - cpu % 4 + 4)
        hertz = 3_900_000 if cpu in slow else 5_200_000 if cpu // 2 in (2, 4) else 5_000_000
        files |= {
            f"{folder}/topology/physical_package_id": "0\n",
            f"{folder}/topology/core_cpus_list": _list(core),
            f"{folder}/cache/index2/level": "2\n",
            f"{folder}/cache/index2/shared_cpu_list": _list(level2),
            f"{folder}/cache/index3/level": "3\n",
            f"{folder}/cache/index3/shared_cpu_list": every,
            f"{folder}/cpufreq/cpuinfo_max_freq": f"{hertz}\n",
        }
    return files


def write_tree(root: Path, *trees: Files) -> Path:
    for path, contents in {k: v for tree in trees for k, v in tree.items()}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(contents)
    return root


@functools.cache
def topology_of(server: Server) -> Topology:
    """What is read from its tree."""
    with TemporaryDirectory() as folder:
        return read_topology(write_tree(Path(folder), server_files(server)) / "sys", ())


def machine(
    topology: Topology, *, affinity: Sequence[int] = (), limits: Limits = NO_LIMITS, here: int = 0
) -> Machine:
    """``affinity``: all CPUs if none."""
    every = sorted(cpu for core in topology.cores for cpu in core.cpus)
    return Machine(topology=topology, affinity=tuple(affinity or every), limits=limits, here=here)


def cgroup2(group: str, files: Files, mounted: str = "/") -> Files:
    """Version 2 alone: ``files`` below the mount point, and our group's name."""
    mount = f"30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"  # noqa: E501
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": _MOUNTS + mount,
        **{f"sys/fs/cgroup/{path}": contents for path, contents in files.items()},
    }


def cgroup1(group: str, files: Files, mounted: str = "/", unified: bool = False) -> Files:
    """Version 1: ``cpu,cpuacct``, ``cpuset`` and ``memory``, each mounted in a folder of its own.
    ``unified``: with version 2 beside it, which has no controllers."""
    names = ("cpuset", "cpu,cpuacct", "memory")
    mounts = [
        f"{31 + i} 25 0:{27 + i} {mounted} /sys/fs/cgroup/{name} rw,nosuid,nodev,noexec,relatime master:{9 + i} - cgroup cgroup rw,{name}\n"  # noqa: E501
        for i, name in enumerate(names)
    ]
    lines = [f"{9 - i}:{name}:{group}\n" for i, name in enumerate(names)]
    lines += ["1:name=systemd:/docker/5f2b\n"]
    if unified:
        mounts.insert(0, "26 25 0:22 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw,nsdelegate\n")  # noqa: E501  # fmt: skip
        lines.append("0::/system.slice/containerd.service\n")
    return {
        "proc/self/cgroup": "".join(lines),
        "proc/self/mountinfo": _MOUNTS + "".join(mounts),
        **{f"sys/fs/cgroup/{path}": contents for path, contents in files.items()},
    }


_MOUNTS = (
    "22 1 252:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard,errors=remount-ro\n"
    "23 22 0:21 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw\n"
    "24 22 0:5 / /mnt/two\\040words rw,relatime - tmpfs tmpfs rw,size=65536k\n"
)


def _cpu_files(server: Server, cpu: int) -> Files:
    core = cpu % server.cores
    in_socket = server.cores // server.sockets
    folder = f"sys/devices/system/cpu/cpu{cpu}"
    own = range(core, server.cores * server.smt, server.cores)
    shared = _group(server, core // server.cores_a_cache, server.cores_a_cache)
    return {
        f"{folder}/topology/physical_package_id": f"{core // in_socket}\n",
        f"{folder}/topology/core_cpus_list": _list(own),
        f"{folder}/topology/thread_siblings_list": _list(own),
        f"{folder}/cache/index2/level": "2\n",
        f"{folder}/cache/index2/shared_cpu_list": _list(own),
        f"{folder}/cache/index3/level": "3\n",
        f"{folder}/cache/index3/shared_cpu_list": _list(shared),
    }


def _group(server: Server, index: int, size: int) -> list[int]:
    """CPUs of the ``index``-th ``size`` cores."""
    return [
        thread * server.cores + core
        for thread in range(server.smt)
        for core in range(index * size, (index + 1) * size)
    ]


def _list(cpus: Sequence[int]) -> str:
    return f"{cpu_list(cpus)}\n"
