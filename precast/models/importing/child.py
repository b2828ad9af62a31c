"""What runs in an importer's child: within a bound of memory, and with one line for what is wrong.

A process of its own, so that work on a file that was downloaded, and which runs out of memory, is
killed, or makes a library abort, takes nothing with it.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from precast.errors import PrecastError
from precast.system.process import die_with_parent

Report = Callable[[str], None]
_LONGEST: Final = 1000
"""Characters of a line: what a file says may be longer."""


def run(source: Path, memory_bytes: int, work: Callable[[Report], object]) -> int:
    """The process' exit code: 0, or 2 and one line on stderr if ``work`` refuses the source.
    ``work`` gets what prints a JSON line for each of its stages."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    try:
        work(_report)
    except PrecastError as error:
        return _refuse(type(error).__name__, str(error))
    except MemoryError:
        return _refuse(
            "PrecastError", f"{source}: needs more than {memory_bytes >> 20} MiB of memory"
        )
    except RecursionError:
        return _refuse("ModelCorrupt", f"{source}: nested too deeply")
    except OSError as error:
        return _refuse("ConfigError", f"{error.filename or source}: {error.strerror or error}")
    except BaseException as error:  # whatever a broken file makes a library raise, panics too
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        return _refuse("ModelCorrupt", f"{source}: {reason}")
    return 0


def _report(stage: str) -> None:
    sys.stdout.write(json.dumps({"stage": stage}) + "\n")
    sys.stdout.flush()


def _refuse(kind: str, text: str) -> int:
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    sys.stderr.write(f"{kind}: {line[:_LONGEST]}\n")
    return 2
