"""A simulated rank with faults: ``python -m tests.support.faulty_rank --fd N``.

It ends itself with SIGSEGV when it is to load a graph that is named ``crash``, and at a step that
has the token ``POISON`` in it. While the file that ``PRECAST_NO_START`` names exists, it does not
start.
"""

import os
import signal
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from msgspec import structs

from precast.ops.draw_status import DrawStatus
from services.decode_worker.ranks.protocol import Command, Init, Reply, Step, StepDone
from tests.support import simulated_rank

POISON = 255
DAMAGED = 254


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
    reply = honest(command, init, step_s, load)
    return damage(command, reply) if isinstance(command, Step) else reply


def damage(step: Step, reply: Reply | None) -> Reply | None:
    assert isinstance(reply, StepDone)
    given = np.frombuffer(step.token_ids, dtype=np.int32)
    starts = np.frombuffer(step.query_starts, dtype=np.int32)
    tokens = list(reply.token_ids)
    draws = np.frombuffer(step.draws, dtype=np.int32).tolist()
    places = accumulate(draws, initial=0)
    for place, count, (first, last) in zip(places, draws, pairwise(starts), strict=False):
        if count and DAMAGED in given[first:last]:
            tokens[place] = -1
            reply.failed[place] = DrawStatus.NOT_FINITE
    return structs.replace(reply, token_ids=tokens)


if __name__ == "__main__":
    if Path(os.environ.get("PRECAST_NO_START") or "/nowhere").exists():
        sys.exit(1)
    honest, simulated_rank.reply_to = simulated_rank.reply_to, reply_to
    simulated_rank.main({}, load)
