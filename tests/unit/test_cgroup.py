"""CPU quota, CPU set and memory limit of both versions of control groups, and of parents."""

from pathlib import Path

import pytest

from precast.system.cgroup import CpuQuota, Limits, MemoryLimit, read_limits
from precast.system.free_memory import free_memory
from tests.support.machines import Files, cgroup1, cgroup2, meminfo, write_tree

GIB = 1 << 30
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7d0c.slice"
OWN = f"{POD}/cri-containerd-5f2b.scope"
STAT = "anon 104857600\nfile 2147483648\ninactive_file 1073741824\nslab_reclaimable 4096\n"
UNLIMITED_1 = "9223372036854771712\n"
DOCKER = "/docker/5f2b"


def pod(own: Files, parent: Files) -> Files:
    """A container's group and its pod's, with the groups of the node above."""
    files = {f"{OWN}/{name}": text for name, text in own.items()}
    files |= {f"{POD}/{name}": text for name, text in parent.items()}
    for path in ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice"):
        files |= {f"{path}/cpu.max": "max 100000\n", f"{path}/memory.max": "max\n"}
    files["cpuset.cpus.effective"] = "0-63\n"  # the root group has no limits, but this
    return cgroup2(f"/{OWN}", files)


def test_a_pods_limits_hold_for_its_container(tmp_path: Path) -> None:
    tree = pod(
        {
            "cpu.max": "max 100000\n",
            "memory.max": "max\n",
            "memory.current": f"{2 * GIB}\n",
            "memory.stat": STAT,
            "cpuset.cpus.effective": "0-127\n",
        },
        {
            "cpu.max": "400000 100000\n",
            "memory.max": f"{8 * GIB}\n",
            "memory.current": f"{3 * GIB}\n",
            "memory.stat": STAT,
        },
    )
    assert read_limits(write_tree(tmp_path, tree)) == Limits(
        quota=CpuQuota(cpus=4.0, path=f"/sys/fs/cgroup/{POD}/cpu.max"),
        cpuset=tuple(range(128)),
        memory=MemoryLimit(limit=8 * GIB, used=2 * GIB, path=f"/sys/fs/cgroup/{POD}/memory.max"),
    )


def test_the_tightest_limit_wins_whoever_sets_it(tmp_path: Path) -> None:
    """The container's own quota is smaller, but its pod has less memory left."""
    tree = pod(
        {
            "cpu.max": "150000 100000\n",
            "memory.max": f"{6 * GIB}\n",
            "memory.current": f"{GIB}\n",
        },
        {
            "cpu.max": "400000 100000\n",
            "memory.max": f"{8 * GIB}\n",
            "memory.current": f"{7 * GIB}\n",
        },
    )
    limits = read_limits(write_tree(tmp_path, tree))
    assert limits.quota == CpuQuota(cpus=1.5, path=f"/sys/fs/cgroup/{OWN}/cpu.max")
    assert limits.memory is not None
    assert (limits.memory.headroom, limits.memory.path) == (
        GIB,
        f"/sys/fs/cgroup/{POD}/memory.max",
    )


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    tree = pod({"memory.max": f"{8 * GIB}\n", "memory.high": f"{6 * GIB}\n"}, {})
    memory = read_limits(write_tree(tmp_path, tree)).memory
    assert memory == MemoryLimit(limit=6 * GIB, used=0, path=f"/sys/fs/cgroup/{OWN}/memory.high")


def test_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    """It is at the top of what it sees."""
    files = {
        "cpu.max": "200000 100000\n",
        "memory.max": f"{GIB}\n",
        "memory.current": "4096\n",
        "cpuset.cpus.effective": "6-7\n",
    }
    limits = read_limits(write_tree(tmp_path, cgroup2("/", files)))
    assert limits.quota == CpuQuota(cpus=2.0, path="/sys/fs/cgroup/cpu.max")
    assert limits.cpuset == (6, 7)
    assert limits.memory is not None
    assert limits.memory.headroom == GIB - 4096


def test_a_process_outside_of_its_namespaces_root(tmp_path: Path) -> None:
    """As after ``nsenter``: what is mounted is all that can be read."""
    tree = cgroup2("/../../user.slice", {"cpu.max": "200000 100000\n"})
    assert read_limits(write_tree(tmp_path, tree)).quota is not None


@pytest.mark.parametrize("unified", [False, True])
def test_version_1(tmp_path: Path, unified: bool) -> None:
    """Docker mounts the container's own group; with version 2 beside it, nothing changes."""
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cpuset/cpuset.cpus": "0-7\n",
        "cpuset/cpuset.effective_cpus": "0-3\n",
        "memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "memory/memory.stat": f"inactive_file 0\nhierarchical_memory_limit {4 * GIB}\n"
        f"total_inactive_file {GIB}\n",
    }
    tree = cgroup1(DOCKER, files, mounted=DOCKER, unified=unified)
    assert read_limits(write_tree(tmp_path, tree)) == Limits(
        quota=CpuQuota(cpus=1.5, path="/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
        cpuset=(0, 1, 2, 3),
        memory=MemoryLimit(
            limit=4 * GIB, used=2 * GIB, path="/sys/fs/cgroup/memory/memory.limit_in_bytes"
        ),
    )


def test_parents_of_version_1(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/docker/5f2b/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/docker/5f2b/cpu.cfs_period_us": "100000\n",
        "cpuset/docker/5f2b/cpuset.cpus": "0-3\n",
        "memory/docker/5f2b/memory.limit_in_bytes": UNLIMITED_1,
        "memory/memory.limit_in_bytes": UNLIMITED_1,
    }
    limits = read_limits(write_tree(tmp_path, cgroup1(DOCKER, files)))
    assert limits.quota == CpuQuota(
        cpus=3.0, path="/sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us"
    )
    assert limits.cpuset == (0, 1, 2, 3)
    assert limits.memory is None


def test_version_1_tells_the_limit_of_parents_that_are_not_mounted(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED_1,
        "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}\n",
    }
    tree = cgroup1("/kubepods/pod7/5f2b", files, mounted="/kubepods/pod7/5f2b")
    memory = read_limits(write_tree(tmp_path, tree)).memory
    assert memory is not None
    assert (memory.headroom, memory.path) == (GIB, "/sys/fs/cgroup/memory/memory.stat")


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": "\n"},
        cgroup2("/gone", {}),
        cgroup2("/", {"cpu.max": "\n", "memory.max": "a lot\n", "cpuset.cpus.effective": "x"}),
        cgroup2("/", {"cpu.max": "max 100000\n", "memory.max": "max\n"}),
        cgroup1(DOCKER, {}, mounted=DOCKER),
    ],
)
def test_no_limit(tmp_path: Path, tree: Files) -> None:
    assert read_limits(write_tree(tmp_path, tree)) == Limits()


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    tree = cgroup2("/", {"cpu.max": "200000 100000\n"})
    moved = {
        path.replace("sys/fs/cgroup", "my groups"): text.replace("/sys/fs/cgroup", "/my\\040groups")
        for path, text in tree.items()
    }
    quota = read_limits(write_tree(tmp_path, moved)).quota
    assert quota == CpuQuota(cpus=2.0, path="/my groups/cpu.max")


@pytest.mark.parametrize(
    ("limit", "used", "nbytes", "why"),
    [
        (8, 1, 7, "/sys/fs/cgroup/memory.max allows 8.0 GiB, 1.0 GiB of it are used"),
        (8, 9, 0, "/sys/fs/cgroup/memory.max allows 8.0 GiB, 9.0 GiB of it are used"),
        (250, 1, 100, "100.0 GiB of the host's 256.0 GiB are available"),
    ],
)
def test_free_memory_is_the_least_that_anybody_leaves(
    tmp_path: Path, limit: int, used: int, nbytes: int, why: str
) -> None:
    files = {"memory.max": f"{limit * GIB}\n", "memory.current": f"{used * GIB}\n"}
    host = {"proc/meminfo": meminfo(256, available=100)}
    free = free_memory(write_tree(tmp_path, host, cgroup2("/", files)))
    assert (free.nbytes, free.why) == (nbytes * GIB, why)


def test_this_machine_has_memory() -> None:
    assert free_memory().nbytes > 0
