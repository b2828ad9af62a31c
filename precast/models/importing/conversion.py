"""Work on a model's files in a child process, with a bound on its memory and time: the conversion
of a GGUF file, the first look at a folder."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from precast import errors
from precast.errors import DeadlineExceeded, ModelCorrupt, PrecastError

Report = Callable[[str], None]
"""Called with each stage of an import, to show progress."""

DEADLINE_S: Final = 3600.0
_MEMORY: Final = 4 << 30
"""Bytes that a conversion may take: tensors pass through it some rows at a time."""
_CONVERT: Final = "precast.models.importing.gguf"
_CHECK: Final = "precast.models.importing.check_folder"
_LINE: Final = 64 << 10
_LINE_SHOWN: Final = 300


def convert_in_child(source: Path, target: Path, report: Report) -> None:
    """Fill ``target`` from a GGUF file. Raises ``PrecastError`` with one line."""
    command = [sys.executable, "-m", _CONVERT, str(source), str(target), str(_MEMORY)]
    run_bounded(command, source, target / "conversion.log", DEADLINE_S, report)


def check_in_child(source: Path, target: Path, report: Report) -> None:
    """Read a folder's headers and its tokenizer, where a library that aborts takes nothing with
    it. ``target``: a folder to work in. Raises what ``check_model`` does."""
    command = [sys.executable, "-m", _CHECK, str(source), str(_MEMORY)]
    run_bounded(command, source, target / "check.log", DEADLINE_S, report)


def run_bounded(
    command: Sequence[str], source: Path, log_path: Path, deadline_s: float, report: Report
) -> None:
    """Runs a conversion and reports its stages; its log goes with its success.

    Raises the error that it names in its last line, or ``DeadlineExceeded``: then, as in every
    other case, nothing of its process group is left.
    """
    end = time.monotonic() + deadline_s
    with log_path.open("w+") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            _follow(child, report, end)
            code = child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(
                f"{source}: reading it took longer than {deadline_s:g} s"
            ) from None
        finally:
            _end(child)
        log.seek(0)
        if code != 0:
            raise failure(source, code, log.read())
    log_path.unlink()


def _follow(child: "subprocess.Popen[bytes]", report: Report, end: float) -> None:
    """Until the child closes its output, or the time is up."""
    assert child.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0 and selector.select(left):
            chunk = os.read(child.stdout.fileno(), _LINE)
            if not chunk:
                return
            *lines, pending = (pending + chunk)[-_LINE:].split(b"\n")
            for line in lines:
                _report_stage(line, report)


def _report_stage(line: bytes, report: Report) -> None:
    try:
        report(str(json.loads(line)["stage"]))
    except (ValueError, KeyError, TypeError):
        pass  # a library's own word on stdout


def _end(child: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def failure(source: Path, code: int, log: str) -> PrecastError:
    """The error that the child has named in its last line; of one that was killed or gave up, what
    it wrote first."""
    lines = log.strip().splitlines() or [""]
    kind, _, text = lines[-1].partition(": ")
    found = getattr(errors, kind, None)
    if code == 2 and isinstance(found, type) and issubclass(found, PrecastError):
        return found(text)
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    said = lines[0 if code < 0 else -1][:_LINE_SHOWN]
    return ModelCorrupt(f"{source}: reading it ended with {how}: {said}".rstrip(": "))
