"""What a fork and join of the compute threads costs, ours against libgomp's (torch's own).

    python -m bench.threads [--rounds 30]

The cost is the time of an operator with next to nothing to do on all threads, less its time on one.
Ours is also measured with a pause before each call, after which workers have gone to sleep. CPU use
is that of the whole process while operators are called once a millisecond, and a second after the
last call, in cores.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from precast.ops import native
from precast.system.process import available_cpus, pin

CALLS = 2000
PAUSE_S = 0.002
Measured = dict[str, float]


def ours(threads: int, pinned: bool) -> Callable[[], object]:
    cores = available_cpus()[:threads]
    native.start_threads(cores if pinned else (-1,) * threads)
    words = torch.ones(8 * 16, dtype=torch.int64)
    read = torch.ops.precast.read_memory
    return lambda: read(words)


def libgomp(threads: int, pinned: bool) -> Callable[[], object]:
    """A layer norm of a row a thread: torch forks for it however little there is to do."""
    pin(available_cpus()[:threads])  # libgomp has no say in where its threads run, but the set
    torch.set_num_threads(threads)
    rows = torch.ones(8 * threads, 8)
    return lambda: torch.layer_norm(rows, (8,))


def call_us(call: Callable[[], object], rounds: int) -> float:
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - started) / CALLS * 1e6)
    return statistics.median(samples)


def call_after_pause_us(call: Callable[[], object], rounds: int) -> float:
    samples = []
    for _ in range(rounds * 5):
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e6)
    return statistics.median(samples)


def cores_used(call: Callable[[], object] | None, seconds: float) -> float:
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        time.sleep(0.001)
        if call is not None:
            call()
    return (time.process_time() - cpu) / (time.perf_counter() - started)


def measure(
    make: Callable[[int, bool], Callable[[], object]], threads: int, pinned: bool, rounds: int
) -> Measured:
    """In a process of its own: libgomp's threads can't be ended, nor pins taken back."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        call = make(threads, pinned)
        call()
        result = {
            "busy": call_us(call, rounds),
            "paused": call_after_pause_us(call, rounds),
            "cores, a call a ms": cores_used(call, 1.0),
            "cores, idle": cores_used(None, 1.0),
        }
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.waitpid(child, 0)
    measured: Measured = json.loads(os.read(reading, 1 << 16))
    os.close(reading)
    os.close(writing)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=len(available_cpus()))
    arguments = parser.parse_args()
    table = Table("pool", "fork/join us", "after 2 ms us", "cores, a call a ms", "cores, idle")
    cases = (
        ("ours, pinned", ours, True),
        ("ours, not pinned", ours, False),
        ("libgomp", libgomp, True),
    )
    for name, make, pinned in cases:
        one = measure(make, 1, pinned, arguments.rounds)
        all_threads = measure(make, arguments.threads, pinned, arguments.rounds)
        table.add_row(
            name,
            f"{all_threads['busy'] - one['busy']:.2f}",
            f"{all_threads['paused'] - one['paused']:.2f}",
            f"{all_threads['cores, a call a ms'] - one['cores, a call a ms']:.2f}",
            f"{all_threads['cores, idle'] - one['cores, idle']:.2f}",
        )
    Console().print(
        f"{arguments.threads} threads, less the same on one; load {os.getloadavg()[0]:.1f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
