"""The ``precast`` command in a fork, for tests that are about what it says."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Final

from precast.cli.main import app
from tests.support import forked

PROGRAM: Final = "tests.support.command:main"


def main(arguments: Sequence[str]) -> None:
    app(args=list(arguments), prog_name="precast")


def precast(
    *arguments: object, environment: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> "subprocess.CompletedProcess[str]":
    """``precast ARGUMENTS``, ended. ``environment`` is in addition to ours."""
    return run(PROGRAM, *arguments, environment=environment, timeout_s=timeout_s)


def run(
    program: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> "subprocess.CompletedProcess[str]":
    """``program``, a ``module:function`` that is given the arguments, ended."""
    command = [str(argument) for argument in arguments]
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = forked.start(program, command, stdout=out, stderr=err, environment=variables)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        said = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess([program, *command], code, *said)
