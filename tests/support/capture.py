"""Real captures for tests, which share what captures may share: headers and compiled parts.

They lie in the home folder of `make`, so that the next run finds them too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HOME = Path(os.environ.get("PRECAST_HOME") or Path(__file__).parents[2] / ".precast")
BUILD_DIR = HOME / "cache" / "build"


def run_capture(
    factors: Mapping[str, str], out: Path, build_dir: Path = BUILD_DIR
) -> subprocess.CompletedProcess[str]:
    """One capture into ``out``, as the compile worker starts it."""
    command = [sys.executable, "-m", "precast.graphs.capture.entry", "--out", str(out)]
    return subprocess.run(
        [*command, "--kept", str(build_dir)],
        input=json.dumps(dict(factors)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
