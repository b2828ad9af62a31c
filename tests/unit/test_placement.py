"""Plans for machines that are built file by file: exact cores, and why."""

from pathlib import Path

import pytest

from precast.errors import ConfigError
from precast.system.cgroup import read_limits
from precast.system.deal import deal
from precast.system.placement import (
    UNPINNED,
    Machine,
    Placement,
    compute_threads,
    described,
    plan,
    this_machine,
)
from precast.system.process import available_cpus
from precast.system.topology import Core, Topology, cpu_list, read_topology
from tests.support.machines import (
    EPYC_64,
    XEON_2X28,
    Files,
    Server,
    cgroup1,
    cgroup2,
    laptop_files,
    machine,
    topology_of,
    write_tree,
)


def ranks(placement: Placement) -> list[str]:
    return [described(rank) for group in placement.replicas for rank in group]


def why(placement: Placement) -> str:
    return "; ".join(placement.reasons)


@pytest.fixture
def laptop(tmp_path: Path) -> Machine:
    return machine(read_topology(write_tree(tmp_path, laptop_files()) / "sys", ()))


@pytest.fixture
def xeon() -> Machine:
    return machine(topology_of(XEON_2X28))


@pytest.fixture
def epyc() -> Machine:
    return machine(topology_of(EPYC_64))


def limited(root: Path, server: Server, groups: Files, here: int = 0) -> Machine:
    return machine(topology_of(server), limits=read_limits(write_tree(root, groups)), here=here)


def quota(cpus: float) -> Files:
    return cgroup2("/", {"cpu.max": f"{int(cpus * 100_000)} 100000\n"})


# A laptop with P and E cores


def test_a_laptop_computes_on_its_fast_cores(laptop: Machine) -> None:
    placement = plan(laptop)
    assert placement.replicas[0][0].threads == (0, 2, 4, 6, 8, 10)
    assert cpu_list(placement.spare) == "12-19"
    assert "only the 6 P cores compute, not the 8 others" in why(placement)
    assert placement.warnings == ()


def test_kinds_are_not_mixed_for_many_ranks(laptop: Machine) -> None:
    placement = plan(laptop, tp=8)
    assert [rank.threads for rank in placement.replicas[0]] == [(cpu,) for cpu in range(12, 20)]
    assert "only the 8 E cores" in why(placement)


def test_kinds_are_mixed_only_where_neither_has_enough(laptop: Machine) -> None:
    placement = plan(laptop, replicas=10)
    used = [cpu for group in placement.replicas for rank in group for cpu in rank.threads]
    assert len(used) == len(set(used)) == 14 - 1
    assert "mixed" in placement.warnings[0]


def test_two_ranks_of_a_laptop(laptop: Machine) -> None:
    assert ranks(plan(laptop, tp=2)) == [
        "3 threads on CPUs 0,2,4, node 0",
        "3 threads on CPUs 6,8,10, node 0",
    ]


# Two sockets of 28 cores with SMT


def test_ranks_have_a_socket_each(xeon: Machine) -> None:
    placement = plan(xeon, tp=2)
    assert ranks(placement) == [
        "27 threads on CPUs 0-26, node 0",
        "27 threads on CPUs 28-54, node 1",
    ]
    assert placement.spare == (27, 55, 83, 111)
    assert "56 cores with 112 CPUs (0-111): a thread for each core" in why(placement)
    assert "one core is left to leader and gateway" in why(placement)
    assert "1 core more left: ranks get equal numbers" in why(placement)
    assert placement.warnings == ()


def test_one_rank_has_both_sockets_and_a_warning(xeon: Machine) -> None:
    placement = plan(xeon)
    assert ranks(placement) == ["55 threads on CPUs 0-54, nodes 0-1"]
    assert placement.spare == (55, 111)
    assert placement.warnings == (
        "a rank spans 2 nodes: tp = 2 would keep each rank's memory on its own",
    )


def test_replicas_have_a_socket_each_and_ranks_share_it(xeon: Machine) -> None:
    assert ranks(plan(xeon, tp=2, replicas=2)) == [
        "14 threads on CPUs 0-13, node 0",
        "14 threads on CPUs 14-27, node 0",
        "13 threads on CPUs 28-40, node 1",
        "13 threads on CPUs 41-53, node 1",
    ]


def test_three_ranks_stay_within_sockets(xeon: Machine) -> None:
    assert [rank.nodes for rank in plan(xeon, tp=3).replicas[0]] == [(0,), (0,), (1,)]


def test_no_rank_shares_a_core_with_another(xeon: Machine) -> None:
    core_of = {cpu: core for core in xeon.topology.cores for cpu in core.cpus}
    for tp in (1, 2, 3, 4, 7, 8, 28, 55, 56):
        threads = [cpu for rank in plan(xeon, tp=tp).replicas[0] for cpu in rank.threads]
        assert len({core_of[cpu].cpus for cpu in threads}) == len(threads) <= 56


def test_one_socket_by_affinity(xeon: Machine) -> None:
    """``taskset -c 28-55``: second hardware threads are not there."""
    placement = plan(machine(xeon.topology, affinity=range(28, 56)), tp=2)
    assert ranks(placement) == [
        "13 threads on CPUs 28-40, node 1",
        "13 threads on CPUs 41-53, node 1",
    ]
    assert "28 cores with 28 CPUs (28-55 of 112: affinity or cpuset)" in why(placement)


def test_second_hardware_threads_alone(xeon: Machine) -> None:
    assert ranks(plan(machine(xeon.topology, affinity=(56, 57)))) == [
        "2 threads on CPUs 56-57, node 0"
    ]


def test_both_threads_of_a_core_make_one(xeon: Machine) -> None:
    assert ranks(plan(machine(xeon.topology, affinity=(6, 62)))) == ["1 thread on CPU 6, node 0"]


def test_an_affinity_that_is_lopsided_is_cut_evenly(xeon: Machine) -> None:
    """A rank of the 2 cores of the second socket alone would hold up the one of 14."""
    placement = plan(machine(xeon.topology, affinity=(*range(14), 28, 29)), tp=2)
    assert [len(rank.threads) for rank in placement.replicas[0]] == [7, 7]


# 64 cores, four nodes, eight L3 caches


@pytest.mark.parametrize(
    ("tp", "first", "last"),
    [
        (2, "31 threads on CPUs 0-30, nodes 0-1", "31 threads on CPUs 32-62, nodes 2-3"),
        (4, "15 threads on CPUs 0-14, node 0", "15 threads on CPUs 48-62, node 3"),
        (8, "7 threads on CPUs 0-6, node 0", "7 threads on CPUs 56-62, node 3"),
        (16, "3 threads on CPUs 0-2, node 0", "3 threads on CPUs 59-61, node 3"),
    ],
)
def test_ranks_have_nodes_then_caches_of_their_own(
    epyc: Machine, tp: int, first: str, last: str
) -> None:
    placed = ranks(plan(epyc, tp=tp))
    assert (placed[0], placed[-1]) == (first, last)
    assert len(placed) == tp


def test_eight_ranks_share_no_cache(epyc: Machine) -> None:
    l3 = {core.cpus[0]: core.l3 for core in epyc.topology.cores}
    caches = [{l3[cpu] for cpu in rank.threads} for rank in plan(epyc, tp=8).replicas[0]]
    assert caches == [{first} for first in range(0, 64, 8)]


def test_a_node_stays_empty_rather_than_a_rank_crossing_one(epyc: Machine) -> None:
    placement = plan(epyc, tp=3)
    assert [rank.nodes for rank in placement.replicas[0]] == [(0,), (1,), (2,)]
    assert cpu_list(placement.spare) == "48-63,112-127"


# Quotas


POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7d0c.slice"


def test_a_pod_of_four_cpus_on_64_cores(tmp_path: Path) -> None:
    """Its threads are not pinned: other pods would choose the same cores. They stay on the node
    that the kernel has put the process on."""
    groups = {f"{POD}/cpu.max": "400000 100000\n", f"{POD}/5f2b/cpu.max": "max 100000\n"}
    pod = limited(tmp_path, EPYC_64, cgroup2(f"/{POD}/5f2b", groups), here=37)
    placement = plan(pod)
    assert ranks(placement) == ["4 threads on CPUs 32-47,96-111, node 2, not pinned"]
    assert placement.replicas[0][0].threads == (UNPINNED,) * 4
    assert f"/sys/fs/cgroup/{POD}/cpu.max pays for 4 CPUs: 4 threads" in why(placement)
    assert "not pinned" in why(placement)
    assert placement.warnings == ()


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (1.5, 1), (2, 2), (7.9, 7)])
def test_threads_are_what_the_quota_pays_for(tmp_path: Path, cpus: float, threads: int) -> None:
    placement = plan(limited(tmp_path, EPYC_64, quota(cpus)))
    assert len(placement.replicas[0][0].threads) == threads


def test_of_a_large_quota_leader_and_gateway_have_a_cpu(tmp_path: Path) -> None:
    placement = plan(limited(tmp_path, EPYC_64, quota(16)), tp=2)
    assert [len(rank.threads) for rank in placement.replicas[0]] == [7, 7]
    assert [rank.nodes for rank in placement.replicas[0]] == [(0,), (2,)]


def test_a_quota_of_all_cores_changes_nothing(xeon: Machine, tmp_path: Path) -> None:
    whole = limited(tmp_path, XEON_2X28, quota(112))
    assert plan(whole, tp=2).replicas == plan(xeon, tp=2).replicas


def test_two_workers_under_one_quota_share_it(tmp_path: Path) -> None:
    placement = plan(limited(tmp_path, EPYC_64, quota(4)), replicas=2)
    assert ranks(placement) == [
        "2 threads on CPUs 0-15,64-79, node 0, not pinned",
        "2 threads on CPUs 32-47,96-111, node 2, not pinned",
    ]
    assert "2 replicas share the 4 threads" in why(placement)


def test_unpinned_ranks_of_a_node_may_use_all_of_it(tmp_path: Path) -> None:
    box = limited(tmp_path, EPYC_64, quota(8))
    placed = {rank.cpus for rank in plan(box, tp=8).replicas[0] if rank.nodes == (1,)}
    assert [cpu_list(cpus) for cpus in placed] == ["16-31,80-95"]


def test_what_does_not_divide_goes_to_one_of_them(tmp_path: Path) -> None:
    placement = plan(limited(tmp_path, EPYC_64, quota(5)), replicas=2)
    assert sorted(len(group[0].threads) for group in placement.replicas) == [2, 3]


def test_more_ranks_than_the_quota_pays_for(tmp_path: Path) -> None:
    placement = plan(limited(tmp_path, EPYC_64, quota(1)), tp=2)
    assert [len(rank.threads) for rank in placement.replicas[0]] == [1, 1]
    assert placement.warnings == ("2 threads, one for each rank, share 1 of quota",)


def test_cpuset_and_quota(tmp_path: Path) -> None:
    """A quota that pays for the whole set: these cores are ours alone, so threads are pinned."""
    files = {"cpu.max": "200000 100000\n", "cpuset.cpus.effective": "6-7\n"}
    box = limited(tmp_path, EPYC_64, cgroup2("/", files))
    assert ranks(plan(box)) == ["2 threads on CPUs 6-7, node 0"]
    assert ranks(plan(box, replicas=2)) == [
        "1 thread on CPU 6, node 0",
        "1 thread on CPU 7, node 0",
    ]


def test_exclusive_cpus_of_a_pod_are_two_cores(tmp_path: Path) -> None:
    """Kubernetes' static policy gives whole cores: 4 CPUs are 2 of them."""
    files = {"cpu.max": "400000 100000\n", "cpuset.cpus.effective": "6-7,70-71\n"}
    box = limited(tmp_path, EPYC_64, cgroup2("/", files))
    assert ranks(plan(box)) == ["2 threads on CPUs 6-7, node 0"]


def test_version_1_of_cgroups(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cpuset/cpuset.cpus": "0-3\n",
    }
    box = limited(tmp_path, EPYC_64, cgroup1("/docker/5f2b", files, mounted="/docker/5f2b"))
    assert ranks(plan(box)) == ["1 thread on CPUs 0-3, node 0, not pinned"]


# Small, strange and explicit


def bare(count: int) -> Machine:
    cores = tuple(Core(cpus=(cpu,)) for cpu in range(count))
    return Machine(topology=Topology(cores=cores), affinity=tuple(range(count)))


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (7, 7), (8, 7), (9, 8)])
def test_a_core_is_left_from_eight_on(cores: int, threads: int) -> None:
    assert len(plan(bare(cores)).replicas[0][0].threads) == threads


def test_ranks_share_cores_where_there_are_too_few() -> None:
    placement = plan(bare(2), tp=3)
    assert [rank.threads for rank in placement.replicas[0]] == [(0,), (1,), (0,)]
    assert placement.warnings == ("2 cores for 3 ranks: decoding will be slow",)


def test_replicas_need_not_be_equal_but_ranks_are() -> None:
    assert [group[0].threads for group in plan(bare(3), replicas=2).replicas] == [(0,), (1, 2)]
    assert [rank.threads for rank in plan(bare(3), tp=2).replicas[0]] == [(0,), (1,)]


def test_cores_that_were_asked_for(xeon: Machine) -> None:
    placement = plan(xeon, tp=2, cores=(4, 2, 30, 31))
    assert [rank.threads for rank in placement.replicas[0]] == [(4, 2), (30, 31)]
    assert [rank.nodes for rank in placement.replicas[0]] == [(0,), (1,)]
    assert placement.reasons == ("cores = 4,2,30,31 was asked for: a thread for each",)
    assert placement.warnings == ()


def test_what_is_wrong_with_cores_that_were_asked_for(tmp_path: Path) -> None:
    box = limited(tmp_path, XEON_2X28, quota(2))
    placement = plan(box, cores=(0, 56, 1))
    assert placement.replicas[0][0].threads == (0, 56, 1)
    assert placement.warnings == (
        "/sys/fs/cgroup/cpu.max pays for 2 of these CPUs: threads will be stopped",
        "some of these CPUs are one core's",
    )


def test_a_cpu_that_may_not_be_used_is_refused(xeon: Machine) -> None:
    with pytest.raises(ConfigError, match=r"cores: CPU 9 is not one .* \(0-7\)"):
        plan(machine(xeon.topology, affinity=range(8)), cores=(7, 9))


def test_without_sysfs_the_affinity_decides(tmp_path: Path) -> None:
    placement = plan(machine(read_topology(tmp_path / "sys", (2, 3))), tp=2)
    assert [rank.threads for rank in placement.replicas[0]] == [(2,), (3,)]
    assert placement.reasons[0] == "no topology in sysfs: each CPU counts as a core"


def test_every_way_deals_each_core_once() -> None:
    cores = [Core(cpus=(i,), node=i // 5, l3=i // 2) for i in range(17)]
    for ways in range(1, 18):
        runs = deal(cores, ways)
        dealt = [core for run in runs for core in run]
        assert len(runs) == ways
        assert all(runs)
        assert len(dealt) == len({core.cpus for core in dealt})


def test_this_machine() -> None:
    box = this_machine()
    assert box.affinity == available_cpus()
    threads = compute_threads()
    assert len(threads) >= 1
    assert {*threads} - {UNPINNED} <= {*available_cpus()}
