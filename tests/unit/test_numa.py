"""Memory is placed on nodes: read back from the kernel."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from precast.models.kv_cache import new_cache
from precast.system import numa
from precast.system.memory import CHUNK, Arena
from precast.system.process import available_cpus

MAPS = Path("/proc/self/numa_maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="a kernel without NUMA")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with several nodes, of which the threads are on one."""
    monkeypatch.setattr(numa, "_home", (0,))


def policy(memory: Tensor) -> str:
    """What the kernel says of the mapping that the middle of ``memory`` is in."""
    middle = memory.data_ptr() + memory.nbytes // 2
    starts = {int(line.split()[0], 16): line.split()[1] for line in MAPS.read_text().splitlines()}
    return starts[max(start for start in starts if start <= middle)]


def fresh() -> Tensor:
    """A mapping of its own: what an allocator gives may be where placed memory was before."""
    mapping = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def cores_of(root: Path, nodes: dict[int, list[int]]) -> Path:
    for node, cores in nodes.items():
        for core in cores:
            (root / f"node{node}" / f"cpu{core}").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("cores", "nodes"),
    [((0,), (0,)), ((1, 0), (0,)), ((2, 11), (1,)), ((11, 1), (0, 1)), ((7,), ()), ((-1,), ())],
)
def test_nodes_of_cores(tmp_path: Path, cores: tuple[int, ...], nodes: tuple[int, ...]) -> None:
    root = cores_of(tmp_path, {0: [0, 1], 1: [2, 11]})
    (root / "has_cpu").touch()
    assert numa.nodes_of(cores, root) == nodes


def test_this_machine_has_a_node_for_each_core() -> None:
    assert numa.nodes_of(available_cpus(), numa.NODES)


def test_nothing_is_placed_on_a_machine_with_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "NODES", cores_of(tmp_path, {0: [0]}))
    numa.set_home((0,))
    memory = fresh()
    numa.place(memory)
    assert policy(memory) == "default"


def test_several_nodes_give_the_threads_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "NODES", cores_of(tmp_path, {0: [0], 1: [1]}))
    monkeypatch.setattr(numa, "_home", ())
    numa.set_home((1,))
    assert numa._home == (1,)
    numa.set_home((0, 1))
    assert numa._home == (0, 1)


@pytest.mark.usefixtures("home")
def test_weights_and_caches_are_placed() -> None:
    assert policy(Arena().empty((CHUNK,))) == "prefer:0"
    for token_major in (False, True):
        cache = new_cache(
            "fp32",
            blocks=256,
            kv_heads=4,
            block_size=32,
            head_dim=64,
            token_major=token_major,
        )
        assert [policy(part) for part in cache] == ["prefer:0"] * 2
        assert not cache.k.any()


def test_several_nodes_take_turns() -> None:
    """The kernel leaves out the second node where there is none."""
    memory = fresh()
    numa.place(memory, (0, 1))
    assert policy(memory).startswith("interleave:0")


@pytest.mark.parametrize("node", [1000, 5000])
def test_what_the_kernel_refuses_is_logged_once(node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that forbids it."""
    monkeypatch.setattr(numa, "_home", (node,))
    memory = fresh()
    with capture_logs() as logs:
        numa.place(memory)
        numa.place(memory)
    assert len(logs) == 1
    assert re.search("Invalid|No such", logs[0]["reason"])
    assert policy(memory) == "default"


def test_less_than_a_page_is_left_alone() -> None:
    with capture_logs() as logs:
        numa.place(torch.zeros(8), (0,))
    assert not logs
