"""Real captures for tests, which share what captures may share: headers and compiled parts.

They lie in the home folder of `make`, so that the next run finds them too.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support import capture_forks

HOME = Path(os.environ.get("PRECAST_HOME") or Path(__file__).parents[2] / ".precast")
BUILD_DIR = HOME / "cache" / "build"


def run_capture(
    factors: Mapping[str, str],
    out: Path,
    build_dir: Path = BUILD_DIR,
    program: str = capture_forks.PROGRAM,
) -> "subprocess.CompletedProcess[str]":
    """One capture into ``out``, as the compile worker has it made; or by another ``program``."""
    arguments = ["--out", str(out), "--kept", str(build_dir)]
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as said,
        tempfile.TemporaryFile("w+") as failed,
    ):
        given.write(json.dumps(dict(factors)))
        given.seek(0)
        descriptors = [file.fileno() for file in (given, said, failed)]
        code = capture_forks.order(str(capture_forks.path()), arguments, descriptors, program)
        texts = [file.seek(0) or file.read() for file in (said, failed)]
    return subprocess.CompletedProcess(arguments, code, *texts)
