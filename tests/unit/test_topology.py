"""Cores, nodes, caches and kinds of core, as sysfs describes them."""

import dataclasses
from pathlib import Path

import pytest

from precast.system.process import available_cpus
from precast.system.topology import (
    SYSFS,
    Core,
    cpu_list,
    parse_cpu_list,
    read_topology,
)
from tests.support.machines import EPYC_64, XEON_2X28, Files, laptop_files, server_files, write_tree

CPU = "sys/devices/system/cpu/cpu"


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-2,5\n", (0, 1, 2, 5)),
        ("7\n", (7,)),
        ("\n", ()),
        ("0-27,56-83", (*range(28), *range(56, 84))),
    ],
)
def test_the_kernels_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus
    assert cpu_list(cpus) == text.strip()


@pytest.mark.parametrize("text", ["a", "1-", "-", "1-b"])
def test_a_broken_list(text: str) -> None:
    with pytest.raises(ValueError, match="int"):
        parse_cpu_list(text)


def test_two_sockets_with_smt(tmp_path: Path) -> None:
    topology = read_topology(write_tree(tmp_path, server_files(XEON_2X28)) / "sys", ())
    assert topology.missing == ()
    assert len(topology.cores) == 56
    assert topology.cores[0] == Core(cpus=(0, 56), package=0, node=0, l3=0)
    assert topology.cores[55] == Core(cpus=(55, 111), package=1, node=1, l3=28)
    of_node = [c for core in topology.cores if core.node == 1 for c in core.cpus]
    assert cpu_list(of_node) == "28-55,84-111"


def test_an_epyc_in_nps4(tmp_path: Path) -> None:
    cores = read_topology(write_tree(tmp_path, server_files(EPYC_64)) / "sys", ()).cores
    assert [len([c for c in cores if c.node == n]) for n in range(4)] == [16] * 4
    assert sorted({core.l3 for core in cores}) == list(range(0, 64, 8))
    assert {core.l3 for core in cores if core.node == 3} == {48, 56}
    assert cores[63].cpus == (63, 127)


def test_a_laptop_with_two_kinds_of_core(tmp_path: Path) -> None:
    """The frequencies tell the kinds apart."""
    cores = read_topology(write_tree(tmp_path, laptop_files()) / "sys", ()).cores
    fast = [core.cpus for core in cores if not core.efficient]
    slow = [core.cpus for core in cores if core.efficient]
    assert fast == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert slow == [(cpu,) for cpu in range(12, 20)]
    assert {core.l3 for core in cores} == {0}


def test_performance_counters_tell_the_kinds_apart(tmp_path: Path) -> None:
    """On a virtual machine there may be no frequencies."""
    files = {k: v for k, v in laptop_files().items() if "cpufreq" not in k}
    kinds = {"sys/devices/cpu_core/cpus": "0-11\n", "sys/devices/cpu_atom/cpus": "12-19\n"}
    cores = read_topology(write_tree(tmp_path, files, kinds) / "sys", ()).cores
    assert cpu_list(c for core in cores if core.efficient for c in core.cpus) == "12-19"


def test_capacities_tell_the_kinds_apart(tmp_path: Path) -> None:
    def capacity(cpu: int) -> str:
        return "1024\n" if cpu < 10 else "983\n" if cpu < 12 else "618\n"

    files = {k: v for k, v in laptop_files().items() if "cpufreq" not in k}
    capacities = {f"{CPU}{cpu}/cpu_capacity": capacity(cpu) for cpu in range(20)}
    cores = read_topology(write_tree(tmp_path, files, capacities) / "sys", ()).cores
    assert cpu_list(c for core in cores if core.efficient for c in core.cpus) == "12-19"


def test_favoured_cores_are_no_other_kind(tmp_path: Path) -> None:
    speeds = {
        f"{CPU}{cpu}/cpufreq/cpuinfo_max_freq": "4200000\n" if cpu % 56 < 2 else "3800000\n"
        for cpu in range(112)
    }
    topology = read_topology(write_tree(tmp_path, server_files(XEON_2X28), speeds) / "sys", ())
    assert not any(core.efficient for core in topology.cores)


def test_a_kernel_before_5_3_has_another_name_for_siblings(tmp_path: Path) -> None:
    old = {k: v for k, v in server_files(XEON_2X28).items() if "core_cpus" not in k}
    assert read_topology(write_tree(tmp_path, old) / "sys", ()).cores[0].cpus == (0, 56)


def test_cpus_that_are_off_are_left_out(tmp_path: Path) -> None:
    """The kernel takes them out of every list."""
    files = dict(server_files(EPYC_64)) | {"sys/devices/system/cpu/online": "0-63\n"}
    for cpu in range(64):
        files[f"{CPU}{cpu}/topology/core_cpus_list"] = f"{cpu}\n"
    cores = read_topology(write_tree(tmp_path, files) / "sys", ()).cores
    assert [core.cpus for core in cores] == [(cpu,) for cpu in range(64)]


@pytest.mark.parametrize(
    ("hidden", "left", "said"),
    [
        ("core_cpus thread_siblings", 112, "no SMT siblings in sysfs"),
        ("/node", 56, "no nodes in sysfs"),
        ("sys/", 4, "no topology in sysfs"),
    ],
)
def test_what_a_container_hides_is_named(tmp_path: Path, hidden: str, left: int, said: str) -> None:
    files: Files = {
        path: contents
        for path, contents in server_files(XEON_2X28).items()
        if not any(part in path for part in hidden.split())
    }
    topology = read_topology(write_tree(tmp_path, files) / "sys", (3, 4, 5, 6))
    assert len(topology.cores) == left
    assert len(topology.missing) == 1
    assert topology.missing[0].startswith(said)


def test_without_an_l3_cache_only_nodes_matter(tmp_path: Path) -> None:
    files = {k: v for k, v in server_files(XEON_2X28).items() if "index3" not in k}
    cores = read_topology(write_tree(tmp_path, files) / "sys", ()).cores
    assert {dataclasses.replace(core, cpus=(), package=0) for core in cores} == {
        Core(cpus=(), node=node) for node in (0, 1)
    }


def test_this_machine() -> None:
    cores = read_topology(SYSFS, available_cpus()).cores
    assert {cpu for core in cores for cpu in core.cpus} >= set(available_cpus())
