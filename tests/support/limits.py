"""Real control groups around a command, where the test may make them: version 1, as root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited(controller: str, **limits: int) -> Iterator[tuple[str, ...]]:
    """Words to put in front of a command. ``limits``: a file for each, with _ for the dots."""
    group = ROOT / controller / f"precast-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    try:
        for name, value in limits.items():
            (group / f"{controller}.{name}").write_text(str(value))
        join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ("sh", "-c", join, "sh")
    finally:
        group.rmdir()
