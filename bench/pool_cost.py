"""What a job costs the compute threads by their number: cache lines moved, and instructions.

    python -m bench.pool_cost [--threads 2,16,64]

Counted, not timed, on threads that take turns (pool_cost.cpp), so that a machine of two cores can
say what 64 would do. Beside the pool's own rule, each thread helps the next few, stands that which
it had before, each helps all others. Instructions are valgrind's, where that is installed.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from precast.ops.build import COMMON_FLAGS, SOURCES, compiler

PROGRAM = Path(__file__).with_suffix(".cpp")
JOBS = 20


def build(folder: Path) -> Path:
    """The program, in ``folder``. Raises CalledProcessError."""
    target = folder / "pool_cost"
    command = [compiler(), *COMMON_FLAGS, "-O2", f"-I{SOURCES}", str(PROGRAM), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def reach() -> int:
    """How many others a thread of the pool helps."""
    found = re.search(r"kReach = (\d+);", (SOURCES / "pool_board.h").read_text())
    if found is None:
        raise ValueError("kReach is not in pool_board.h")
    return int(found[1])


def lines_moved(program: Path, threads: int, helped: int) -> float:
    """Cache lines that move between cores in a job."""
    return _a_job(
        lambda jobs: int(_output([str(program), "lines", *_numbers(threads, helped, jobs)]))
    )


def instructions(program: Path, threads: int, helped: int) -> float:
    """Instructions of a job, over all threads. Raises CalledProcessError."""

    def count(jobs: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
            _output([*tool, str(program), "plain", *_numbers(threads, helped, jobs)])
            found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
            return int(found[1]) if found else 0

    return _a_job(count)


def _a_job(count: Callable[[int], int]) -> float:
    """Without what the first jobs and the start cost."""
    return (count(2 * JOBS) - count(JOBS)) / JOBS


def _numbers(threads: int, helped: int, jobs: int) -> list[str]:
    return [str(threads), str(helped), str(jobs)]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", default="2,16,64")
    chosen = [int(part) for part in parser.parse_args().threads.split(",")]
    valgrind = shutil.which("valgrind") is not None
    table = Table(
        "threads", "each helps", "lines moved a job", "a thread", "instructions", "a thread"
    )
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for name, few in ((f"the next {reach()}", True), ("all others", False)):
            for threads in chosen:
                helped = reach() if few else threads - 1
                moved = lines_moved(program, threads, helped)
                ran = instructions(program, threads, helped) if valgrind else None
                both = [f"{moved:.0f}", f"{moved / threads:.1f}"]
                both += [f"{ran:.0f}", f"{ran / threads:.0f}"] if ran is not None else ["-", "-"]
                table.add_row(str(threads), name, *both)
    Console().print(table)


if __name__ == "__main__":
    main()
