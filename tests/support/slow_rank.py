"""A simulated rank that takes its time to load: ``python -m tests.support.slow_rank --fd N``.

``PRECAST_LOADS`` is ``telling``, a frame of progress every tenth of a second for some time, or
``silently``, for ever. Once it runs it makes the file that ``PRECAST_STARTED`` names.
"""

import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from precast.system.process import die_with_parent
from services.decode_worker.ranks.protocol import Loading, frame
from tests.support import simulated_rank

LAYERS = 30


def serve(
    connection: socket.socket,
    step_s: float,
    graph_factors: Mapping[str, str],
    load: simulated_rank.Load,
) -> None:
    for layer in range(LAYERS):
        time.sleep(0.1)
        connection.sendall(frame(Loading(tp_rank=0, done=layer + 1, total=LAYERS)))
    quick(connection, step_s, graph_factors, load)


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    Path(os.environ["PRECAST_STARTED"]).touch()
    if os.environ["PRECAST_LOADS"] == "silently":
        while True:
            pass
    quick, simulated_rank.serve = simulated_rank.serve, serve
    simulated_rank.main({})
