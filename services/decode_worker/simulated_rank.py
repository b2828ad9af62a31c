"""A rank without a model: ``python -m services.decode_worker.simulated_rank --fd N``.

Speaks the rank protocol and draws tokens that depend on position alone, to measure and load the
leader by itself. ``PRECAST_SIMULATED_STEP_MS`` is how long each step takes (default 0).
"""

import argparse
import os
import signal
import socket
import time

import numpy as np

from precast.process import die_with_parent
from services.decode_worker.rank_protocol import (
    FRAME_HEADER,
    Command,
    DropGraph,
    GraphLoaded,
    Init,
    LoadGraph,
    Ready,
    Reply,
    Shutdown,
    Step,
    StepDone,
    decode_command,
    frame,
)

VOCABULARY = 256


def reply_to(command: Command, init: Init, step_s: float) -> Reply | None:
    """What a rank answers, or None. Tokens are the sequences' context lengths, wrapped."""
    if isinstance(command, LoadGraph):
        return GraphLoaded(tp_rank=init.tp_rank, batch_size=command.batch_size, load_ms=0.0)
    if isinstance(command, Step):
        time.sleep(step_s)
        return _draw(command, step_s) if init.tp_rank == 0 else None
    assert isinstance(command, DropGraph)
    return None


def _draw(step: Step, step_s: float) -> StepDone:
    lengths = np.frombuffer(step.context_lens, dtype=np.int32) % VOCABULARY
    drawn = np.array([sample is not None for sample in step.sample])
    return StepDone(
        step_id=step.step_id,
        token_ids=np.where(drawn, lengths, -1).astype(np.int32).tobytes(),
        logprobs=(),
        graph_batch_size=0,
        step_us=int(step_s * 1e6),
    )


def _receive(connection: socket.socket) -> Command:
    """The next command; Shutdown when the leader is gone."""
    header = connection.recv(FRAME_HEADER.size, socket.MSG_WAITALL)
    if len(header) < FRAME_HEADER.size:
        return Shutdown()
    (size,) = FRAME_HEADER.unpack(header)
    body = connection.recv(size, socket.MSG_WAITALL)
    return decode_command(body) if len(body) == size else Shutdown()


def serve(connection: socket.socket, step_s: float) -> None:
    init = _receive(connection)
    if not isinstance(init, Init):
        return
    ready = Ready(
        tp_rank=init.tp_rank,
        load_s=0.0,
        weight_bytes=0,
        kernels={},
        vocab_size=VOCABULARY,
        graph_factors={},
    )
    connection.sendall(frame(ready))
    while not isinstance(command := _receive(connection), Shutdown):
        if (reply := reply_to(command, init, step_s)) is not None:
            connection.sendall(frame(reply))


def main() -> None:
    parser = argparse.ArgumentParser(prog="services.decode_worker.simulated_rank")
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(connection, float(os.environ.get("PRECAST_SIMULATED_STEP_MS", "0")) / 1e3)


if __name__ == "__main__":
    main()
