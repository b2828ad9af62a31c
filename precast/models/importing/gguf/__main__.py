"""``python -m precast.models.importing.gguf FILE FOLDER MEMORY_BYTES``: the importer's child.

A process of its own, so that a conversion that runs out of memory, is killed, or whose file is cut
off meanwhile takes nothing with it. Prints one JSON line a stage; ends with 2 and one line on
stderr if it refuses the file.
"""

import json
import resource
import sys
from pathlib import Path

from precast.errors import PrecastError
from precast.models.importing.gguf.convert import convert
from precast.system.process import die_with_parent


def report(stage: str) -> None:
    sys.stdout.write(json.dumps({"stage": stage}) + "\n")
    sys.stdout.flush()


def main(source: str, target: str, memory_bytes: str) -> int:
    """The process: convert within a bound of memory. The exit code."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    try:
        convert(Path(source), Path(target), report)
    except PrecastError as error:
        return _refuse(type(error).__name__, str(error))
    except MemoryError:
        needed = int(memory_bytes) >> 20
        return _refuse("PrecastError", f"{source}: needs more than {needed} MiB of memory")
    except OSError as error:
        return _refuse("ConfigError", f"{error.filename or source}: {error.strerror or error}")
    except Exception as error:  # whatever a broken file makes a library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return _refuse("ModelCorrupt", f"{source}: {reason}")
    return 0


def _refuse(kind: str, text: str) -> int:
    sys.stderr.write(f"{kind}: {' '.join(text.split())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
