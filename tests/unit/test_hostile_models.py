"""Some of the files that ``tests.support.hostile_models`` makes: it has more."""

import json
import subprocess
import sys


def test_each_is_taken_or_refused_with_one_line() -> None:
    """By a process of its own: it forks, and this one has threads."""
    command = [sys.executable, "-m", "tests.support.hostile_models", "--count=60", "--seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    refused = sum(n for name, n in found["outcomes"].items() if name.endswith("refused"))
    assert 30 < refused < 60, "most of them, and some are sound"
