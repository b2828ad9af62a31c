"""Begins with what takes a command longest before the command itself is imported.

Ranks are forked from a process that has imported torch. That takes several times as long as all
that a worker's leader imports, and runs beside it. Only the command's name is looked at: where its
options turn out to be wrong, the process ends with this one.
"""

from collections.abc import Sequence
from typing import Final

from precast.system.fork_server import ForkServer

MODULES: Final = {"decode-worker": "services.decode_worker.ranks.nursery"}
"""What is imported for a command."""
_begun: dict[str, ForkServer] = {}


def begin(command_line: Sequence[str]) -> None:
    """``command_line``: the program, its command and options."""
    module = MODULES.get(command_line[1]) if len(command_line) > 1 else None
    if module is not None and "--help" not in command_line:
        _begun[module] = ForkServer.start(module)


def taken(module: str) -> ForkServer | None:
    """The process that imports the module, which is the caller's from now on."""
    return _begun.pop(module, None)
