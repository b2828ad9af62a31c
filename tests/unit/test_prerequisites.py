"""What `make` says on a machine that lacks something: one line for each missing thing."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prerequisites.sh"


def check(path: Path, python: str = "python3") -> "subprocess.CompletedProcess[str]":
    """The script's answer with nothing but ``path`` to find programs in."""
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), python],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def program(folder: Path, name: str, body: str = "exit 0") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_nothing_is_missing(tmp_path: Path) -> None:
    program(tmp_path, "python3")
    program(tmp_path, "g++")
    done = check(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"python3": "exit 0"}, "a C++ compiler: g++ is not on PATH"),
        ({"g++": "exit 0"}, "Python 3.11 or newer: python3 is not on PATH"),
        (
            {"g++": "exit 0", "python3": '[ "$1" = -V ] && echo Python 3.9.2; exit 1'},
            "Python 3.11 or newer: python3 is Python 3.9.2",
        ),
        (
            {"g++": "exit 0", "python3": 'case "$2" in *ensurepip*) exit 1;; esac'},
            "Python's venv module",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, there: dict[str, str], named: str
) -> None:
    for name, body in there.items():
        program(tmp_path, name, body)
    done = check(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"precast needs {named}")
    assert done.stderr.count("\n") == 1
