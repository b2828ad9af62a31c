"""``/openapi.json`` against what the server does, as schemathesis finds it with all its checks."""

import subprocess
import sys
from pathlib import Path

from tests.support.gateway_stack import running_stack

TIME_BUDGET_S = 15


def test_schemathesis_finds_nothing(redis_url: str, tmp_path: Path) -> None:
    with running_stack(redis_url, tmp_path) as stack:
        stack.worker(step_ms=1)
        gateway = stack.gateway()
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json"),
            *("--checks", "all", "--phases", "coverage,fuzzing", "--max-examples", "25"),
            *("--max-time", str(TIME_BUDGET_S), "--seed", "1", "--no-color"),
            *("--warnings", "off", "--generation-database", "none"),
        ]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert found.returncode == 0, found.stdout
    assert "passed" in found.stdout
