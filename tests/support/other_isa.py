"""Programs that run with another instruction set than this process."""

import os
import subprocess
import sys


def output_with(isa: str, *arguments: str) -> str:
    """What Python prints, given the arguments, with the kernels of ``isa``. Raises
    CalledProcessError or TimeoutExpired."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PRECAST_NATIVE_ISA": isa},
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    ).stdout
