"""All-reduce latency between two pinned ranks, against gloo in the same run.

    python -m bench.collectives [--cores 0,1] [--rounds 20]

Ours is called from a TorchScript loop, as a graph would call it: without Python, through torch's
dispatcher. Gloo's is called as its users do. The two alternate. On a virtual machine the way
between two cores may change from one run to the next (another chiplet): the fastest round shows the
path's cost, the median what this run met.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from precast.ops import native
from precast.system.process import available_cpus, parse_cpus
from precast.system.shared_memory import new_segment_name

SIZES = (48, 2 << 10, 8 << 10, 32 << 10, 128 << 10, 1 << 20)
"""Bytes."""
GOALS_US = {2 << 10: 3.0, 32 << 10: 10.0}
TIMEOUT_S = 60.0


def _reduce_in_a_chain(x: Tensor, count: int) -> Tensor:
    # Each on the last one's result: equal calls would be folded into one.
    for _ in range(count):
        x = torch.ops.precast.all_reduce(x)
    return x


def ours() -> Callable[[Tensor, int], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and just what is needed here
        scripted: Callable[[Tensor, int], object] = torch.jit.script(_reduce_in_a_chain)
    return scripted


def gloo(x: Tensor, count: int) -> None:
    for _ in range(count):
        dist.all_reduce(x)


def seconds_each(function: Callable[[Tensor, int], object], size: int, count: int) -> float:
    x = torch.zeros(size // 4)
    function(x, 3)
    started = time.perf_counter()
    function(x, count)
    return (time.perf_counter() - started) / count


def measure(rank: int, core: int, name: str, rendezvous: Path, rounds: int) -> Table:
    native.start_threads((core,))
    native.join_group(name, rank, 2, TIMEOUT_S)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    scripted = ours()
    table = Table("bytes", "us, fastest", "us, median", "gloo, fastest", "gloo, median", "goal us")
    for size in SIZES:
        mine, theirs = [], []
        for _ in range(rounds):
            mine.append(seconds_each(scripted, size, 1000 if size <= 32 << 10 else 50) * 1e6)
            theirs.append(seconds_each(gloo, size, 20) * 1e6)
        columns = [f(times) for times in (mine, theirs) for f in (min, statistics.median)]
        goal = GOALS_US.get(size)
        table.add_row(str(size), *(f"{us:.2f}" for us in columns), f"{goal:g}" if goal else "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cores", type=parse_cpus, default=available_cpus()[:2])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if len(arguments.cores) < 2:
        raise SystemExit("two cores are needed")
    name = new_segment_name()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        child = os.fork()
        rank = 1 if child == 0 else 0
        table = measure(rank, arguments.cores[rank], name, Path(folder) / "gloo", arguments.rounds)
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    Console().print(f"2 ranks on cores {arguments.cores}, load {os.getloadavg()[0]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
