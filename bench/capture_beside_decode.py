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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

from bench.served import Load, precast, run
from precast.system.background import remove_idle_cgroups, step_back

LOAD: Final = Load(
    name="16 streams, 8 in 96 out", streams=16, prompt=8, output=96, sampling={"temperature": 0}
)
SOURCE: Final = '#include <regex>\nint main() { return std::regex("a+").mark_count(); }\n'
LOOP: Final = "while g++ -O2 -x c++ -o /dev/null {source}; do :; done"
FLAGS: Final = ("--batch-sizes=16", "--prefill-buckets=16,64", "--no-adapt-graphs")
IDLE: Final = "idle"


def compile_without_pause(how: str, source: str) -> None:
    """Becomes the compilers. Does not return."""
    if how == IDLE:
        step_back()
    os.execvp("sh", ["sh", "-c", LOOP.format(source=source)])


@contextmanager
def compilers(how: str) -> Iterator[None]:
    """One for each core, each in a session of its own, as the capture server is."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "part.cpp"
        source.write_text(SOURCE)
        command = [sys.executable, "-m", "bench.capture_beside_decode", how, str(source)]
        cores = len(os.sched_getaffinity(0))
        started = [subprocess.Popen(command, start_new_session=True) for _ in range(cores)]
        try:
            yield
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            remove_idle_cgroups()


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
            if number:
                found[name].append(speed)
    return found


def report(found: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, speeds in found.items():
        ratio = medians[name] / medians["alone"]
        each = " ".join(f"{speed:.0f}" for speed in speeds)
        print(f"{name}: {medians[name]:.0f} tokens/s ({each}), {ratio:.2f} of alone")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) == 2 and not arguments[0].startswith("-"):
        compile_without_pause(*arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, help="Precast's folder; keeps graphs between runs")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as scratch,
        precast(given.home or Path(scratch), FLAGS) as port,
    ):
        report(measure(port, given.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
