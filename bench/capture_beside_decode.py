"""What captures cost decode on the same cores.

    python -m bench.capture_beside_decode [--rounds 3] [--home FOLDER]

Starts ``precast serve`` on the demo model, waits until its graphs are there, and sends it 16
streams in alternating rounds: alone, beside compilers that have stepped back as captures do, and
beside compilers that have not. There is one for each core, and they compile C++ without a pause.
Prints the median of tokens/s of each, and the ratios.
"""

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

from bench.served import Load, run
from precast.system.background import remove_idle_cgroups
from tests.support.serve_stack import poll, serving

LOAD: Final = Load(
    name="16 streams, 8 in 96 out", streams=16, prompt=8, output=96, sampling={"temperature": 0}
)
SOURCE: Final = '#include <regex>\nint main() { return std::regex("a+").mark_count(); }\n'
LOOP: Final = "while g++ -O2 -x c++ -o /dev/null {source}; do :; done"
COMPILER: Final = """
import os, sys
from precast.system.background import step_back
if sys.argv[1] == "idle":
    step_back()
os.execvp("sh", ["sh", "-c", sys.argv[2]])
"""
FLAGS: Final = ("--batch-sizes=16", "--prefill-buckets=64")
GRAPHS: Final = 2
START_S: Final = 900.0
IDLE: Final = "idle"


@contextmanager
def compilers(how: str) -> Iterator[None]:
    """One for each core, each in a session of its own, as the capture server is."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "part.cpp"
        source.write_text(SOURCE)
        command = [sys.executable, "-c", COMPILER, how, LOOP.format(source=source)]
        cores = len(os.sched_getaffinity(0))
        started = [subprocess.Popen(command, start_new_session=True) for _ in range(cores)]
        try:
            poll(lambda: all(map(_compiles, started)), 60.0, "compilers")
            yield
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            remove_idle_cgroups()


def _compiles(process: "subprocess.Popen[bytes]") -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text().strip() == "sh"


def measure(port: int, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each round; one before warms up."""
    surroundings: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "alone": nullcontext,
        IDLE: lambda: compilers(IDLE),
        "normal": lambda: compilers("normal"),
    }
    found: dict[str, list[float]] = {name: [] for name in surroundings}
    for number in range(rounds + 1):
        for name, surrounding in surroundings.items():
            with surrounding():
                speed = asyncio.run(run(port, LOAD)).tokens_per_s
            print(f"round {number}, {name}: {speed:.0f} tokens/s", flush=True)
            if number:
                found[name].append(speed)
    return found


def report(found: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, speeds in found.items():
        ratio = medians[name] / medians["alone"]
        each = " ".join(f"{speed:.0f}" for speed in speeds)
        print(f"{name}: {medians[name]:.0f} tokens/s ({each}), {ratio:.2f} of alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, help="Precast's folder; keeps graphs between runs")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(given.home or Path(scratch), *FLAGS) as stack,
    ):
        stack.wait_line("Precast serves", START_S)
        log = stack.home / "logs" / "decode-worker.log"
        poll(lambda: log.read_text().count("graph loaded") >= GRAPHS, START_S, "graphs")
        report(measure(stack.port, given.rounds))


if __name__ == "__main__":
    main()
