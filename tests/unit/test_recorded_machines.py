"""Cores and plans of real machines, from what sysfs said on them."""

from collections import Counter
from pathlib import Path

import pytest

from precast.system.placement import Placement, described, plan
from precast.system.topology import Topology, cpu_list, read_topology
from tests.support.machines import RECORDED, machine, recorded_files, write_tree


def topology(root: Path, name: str) -> Topology:
    found = read_topology(write_tree(root, recorded_files(name)) / "sys", ())
    assert found.missing == ()
    return found


@pytest.mark.parametrize(
    ("name", "sockets", "nodes", "cores", "threads", "caches"),
    [
        ("laptop-i7-1370p", 1, 1, 14, 20, 1),
        ("dgx-gb10", 1, 1, 20, 20, 2),
        ("2x-xeon-silver-4108", 2, 2, 16, 32, 2),
        ("2x-epyc-7451", 2, 8, 48, 96, 16),
        ("4x-xeon-e7-4870", 4, 4, 40, 40, 4),
        ("4x-opteron-6276", 4, 8, 32, 64, 8),
        ("2x-xeon-e5-2680v3-cpus-offline", 2, 2, 17, 17, 2),
    ],
)
def test_what_there_is(
    tmp_path: Path, name: str, sockets: int, nodes: int, cores: int, threads: int, caches: int
) -> None:
    found = topology(tmp_path, name).cores
    assert len({core.package for core in found}) == sockets
    assert len({core.node for core in found}) == nodes
    assert len(found) == cores
    assert sum(len(core.cpus) for core in found) == threads
    assert len({core.l3 for core in found}) == caches


@pytest.mark.parametrize(
    ("name", "efficient"),
    [("laptop-i7-1370p", "12-19"), ("dgx-gb10", "0-4,10-14"), ("2x-epyc-7451", "")],
)
def test_which_cores_are_slow_ones(tmp_path: Path, name: str, efficient: str) -> None:
    slow = [core for core in topology(tmp_path, name).cores if core.efficient]
    assert cpu_list(cpu for core in slow for cpu in core.cpus) == efficient


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_no_core_computes_twice_and_kinds_are_not_mixed(tmp_path: Path, name: str, tp: int) -> None:
    found = topology(tmp_path, name)
    core_of = {cpu: core for core in found.cores for cpu in core.cpus}
    used = [core_of[cpu] for cpu in computing(plan(machine(found), tp=tp))]
    assert max(Counter(used).values()) == 1
    assert len({core.efficient for core in used}) == 1


def computing(placement: Placement) -> list[int]:
    return [cpu for group in placement.replicas for rank in group for cpu in rank.threads]


@pytest.mark.parametrize(
    ("name", "tp", "nodes"),
    [
        ("2x-xeon-silver-4108", 2, [(0,), (1,)]),
        ("4x-xeon-e7-4870", 4, [(0,), (1,), (2,), (3,)]),
        ("4x-opteron-6276", 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("2x-epyc-7451", 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("2x-xeon-e5-2680v3-cpus-offline", 2, [(0,), (1,)]),
    ],
)
def test_ranks_go_to_nodes_first(
    tmp_path: Path, name: str, tp: int, nodes: list[tuple[int, ...]]
) -> None:
    placement = plan(machine(topology(tmp_path, name)), tp=tp)
    assert [rank.nodes for rank in placement.replicas[0]] == nodes


def test_the_laptops_plan(tmp_path: Path) -> None:
    placement = plan(machine(topology(tmp_path, "laptop-i7-1370p")))
    assert described(placement.replicas[0][0]) == "6 threads on CPUs 0,2,4,6,8,10, node 0"
    assert cpu_list(placement.spare) == "12-19"
