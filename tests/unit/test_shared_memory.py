"""Leftover segments in /dev/shm."""

import os
import subprocess
import sys

from precast.system.shared_memory import FOLDER, new_segment_name, remove_segment, sweep_segments


def test_segments_of_the_dead_go_and_those_of_the_living_stay() -> None:
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "from precast.system.shared_memory import *; print(new_segment_name())",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.strip()
    mine = new_segment_name()
    for name in (made, mine):
        (FOLDER / name).touch()
    try:
        assert sweep_segments() >= 1
        assert not (FOLDER / made).exists()
        assert (FOLDER / mine).exists()
    finally:
        remove_segment(mine)
    assert not (FOLDER / mine).exists()
    remove_segment(mine)  # a second time is fine


def test_names_tell_processes_and_starts_apart() -> None:
    first, second = new_segment_name(), new_segment_name()
    assert first != second
    assert str(os.getpid()) in first
