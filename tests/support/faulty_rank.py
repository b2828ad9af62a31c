"""A simulated rank with faults: ``python -m tests.support.faulty_rank --fd N``.

It ends itself with SIGSEGV when it is to load a graph that is named ``crash``, and at a step that
has the token ``POISON`` in it. While the file that ``PRECAST_NO_START`` names exists, it does not
start.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from services.decode_worker.ranks.protocol import Command, Init, Reply, Step
from tests.support import simulated_rank

POISON = 255


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def load(graph: Path) -> str | None:
    if graph.name == "crash":
        crash()
    return None


def reply_to(
    command: Command, init: Init, step_s: float, load: simulated_rank.Load
) -> Reply | None:
    if isinstance(command, Step) and POISON in np.frombuffer(command.token_ids, dtype=np.int32):
        crash()
    return honest(command, init, step_s, load)


if __name__ == "__main__":
    if Path(os.environ.get("PRECAST_NO_START") or "/nowhere").exists():
        sys.exit(1)
    honest, simulated_rank.reply_to = simulated_rank.reply_to, reply_to
    simulated_rank.main({}, load)
