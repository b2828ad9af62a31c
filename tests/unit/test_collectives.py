"""Collectives over real rank processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precast.ops import native
from precast.system.shared_memory import FOLDER, new_segment_name
from tests.support import command

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.support.collective_program:main"


def run(case: str, size: int, count: int = 1, timeout_s: float = 60.0) -> dict[str, Any]:
    arguments = (case, f"--size={size}", f"--count={count}")
    program = command.run(PROGRAM, *arguments, timeout_s=timeout_s)
    assert program.returncode == 0, program.stderr[-2000:]
    result: dict[str, Any] = json.loads(program.stdout)
    return result


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("size", "count"), [(2, 10_000), (4, 5_000)])
def test_mixed_collectives_of_mixed_sizes(size: int, count: int) -> None:
    assert run("mixed", size, count, timeout_s=230)["codes"] == [0] * size


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_number_of_ranks(size: int) -> None:
    run("mixed", size, 1000)


def test_two_groups_on_a_host_never_meet() -> None:
    run("two-groups", 2, 5000)


def test_a_killed_rank_is_noticed_within_a_second() -> None:
    noticed = run("kills", 2, 50)["noticed_s"]
    assert len(noticed) == 50
    assert max(noticed) < 1.0


def test_all_survivors_notice() -> None:
    assert max(run("kills", 4, 5)["noticed_s"]) < 1.0


def test_ranks_out_of_step_are_told_what_each_called() -> None:
    run("out-of-step", 2)


def test_what_a_collective_does_not_serve_is_refused() -> None:
    run("refusals", 3)


def test_nothing_stays_behind() -> None:
    run("mixed", 2, 10)
    mine = [path.name for path in FOLDER.glob("precast-*") if f"-{os.getpid()}-" in path.name]
    assert mine == []


def test_an_impossible_rank_is_refused() -> None:
    for rank, size in ((2, 2), (-1, 2), (0, 0), (0, 65)):
        with pytest.raises(RuntimeError, match=f"rank {rank} of {size}"):
            native.join_group(new_segment_name(), rank, size, 1.0)


def test_a_rank_that_never_comes_is_named() -> None:
    name = new_segment_name()
    with pytest.raises(RuntimeError, match="rank 1 did not join group"):
        native.join_group(name, 0, 2, 0.2)
    assert not (FOLDER / name).exists()
    with pytest.raises(RuntimeError, match="rank 0 never made"):
        native.join_group(name, 1, 2, 0.2)


def test_a_name_is_used_once() -> None:
    name = new_segment_name()
    (FOLDER / name).touch()
    try:
        with pytest.raises(RuntimeError, match=r"can't create .*File exists"):
            native.join_group(name, 0, 2, 0.2)
    finally:
        (FOLDER / name).unlink()


def test_a_dev_shm_that_is_too_small_is_a_clear_error() -> None:
    """In a mount namespace of its own, with a /dev/shm of 1 MiB."""
    program = (
        "from precast.ops import native; from precast.system.shared_memory import *\n"
        "try: native.join_group(new_segment_name(), 0, 2, 1.0)\n"
        "except RuntimeError as error: print(str(error).splitlines()[0])\n"
        "print(list(FOLDER.iterdir()))"
    )
    mounted = f"mount -t tmpfs -o size=1m none {FOLDER} && exec {sys.executable} -c '{program}'"
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no mount namespace here: {result.stderr.strip()}")
    error, left = result.stdout.splitlines()
    assert "/dev/shm is too small: need 4198400 bytes" in error
    assert "No space left" in error
    assert left == "[]"


def test_collectives_trace() -> None:
    run("trace", 2)
