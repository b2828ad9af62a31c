"""A rank without a model: ``python -m tests.support.simulated_rank --fd N``.

Speaks the rank protocol and draws tokens that depend on position alone, to measure and load the
leader by itself. ``PRECAST_SIMULATED_STEP_MS`` is how long each step takes (default 0).
"""

import argparse
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from precast.system.process import die_with_parent
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    LAST_DRAWN,
    Command,
    DecodeOn,
    DropGraph,
    GraphLoaded,
    Init,
    Join,
    Loaded,
    LoadGraph,
    Logprobs,
    Masks,
    Ping,
    Pong,
    Ready,
    Reply,
    Shutdown,
    StartSampling,
    Step,
    StepDone,
    decode_command,
    frame,
)

VOCABULARY = 256
Load = Callable[[Path], str | None]
"""What becomes of a graph that is to be loaded: why it is refused, or None."""


def accept(_: Path) -> str | None:
    return None


def reply_to(command: Command, init: Init, step_s: float, load: Load) -> Reply | None:
    """What a rank answers, or None. Tokens are the sequences' context lengths, wrapped."""
    if isinstance(command, Ping):
        return Pong(tp_rank=init.tp_rank)
    if isinstance(command, LoadGraph):
        error = load(Path(command.paths[init.tp_rank]))
        return GraphLoaded(
            tp_rank=init.tp_rank, num_tokens=command.num_tokens, load_ms=0.0, error=error
        )
    if isinstance(command, Step):
        time.sleep(step_s)
        return _draw(command, step_s) if init.tp_rank == 0 else None
    assert isinstance(command, DropGraph | StartSampling | Masks)
    return None


def _draw(step: Step, step_s: float) -> StepDone:
    """A draw behind each of a sequence's last tokens."""
    lengths = np.frombuffer(step.context_lens, dtype=np.int32)
    draws = np.frombuffer(step.draws, dtype=np.int32)
    places = [
        np.arange(length - count, length) + 1 for length, count in zip(lengths, draws, strict=True)
    ]
    return StepDone(
        token_ids=(np.concatenate(places) % VOCABULARY).tolist(),
        scores=_scores(step),
        step_us=int(step_s * 1e6),
    )


def _scores(step: Step) -> tuple[Logprobs, ...]:
    """Of prompts: the token itself is sure."""
    tokens = b"" if step.scored is None else step.scored.tokens
    ids = np.frombuffer(tokens, dtype=np.int32).tolist()
    return tuple(Logprobs(logprob=0.0, top_ids=(token,), top_logprobs=(0.0,)) for token in ids)


def following(last: Step, command: DecodeOn) -> Step:
    """``command`` as a step in full; but its block tables, which nobody looks at here."""
    contexts = np.frombuffer(last.context_lens, dtype=np.int32) + 1
    return msgspec.structs.replace(
        last,
        token_ids=np.full(len(contexts), LAST_DRAWN, dtype=np.int32).tobytes(),
        positions=(contexts - 1).astype(np.int32).tobytes(),
        context_lens=contexts.astype(np.int32).tobytes(),
        graph_size=command.graph_size,
        shadow=command.shadow,
    )


def _receive(connection: socket.socket) -> Command:
    """The next command; Shutdown when the leader is gone."""
    header = connection.recv(FRAME_HEADER.size, socket.MSG_WAITALL)
    if len(header) < FRAME_HEADER.size:
        return Shutdown()
    (size,) = FRAME_HEADER.unpack(header)
    body = connection.recv(size, socket.MSG_WAITALL)
    return decode_command(body) if len(body) == size else Shutdown()


def serve(
    connection: socket.socket, step_s: float, graph_factors: Mapping[str, str], load: Load
) -> None:
    init = _receive(connection)
    if not isinstance(init, Init):
        return
    connection.sendall(frame(Loaded(tp_rank=init.tp_rank)))
    if not isinstance(_receive(connection), Join):
        return
    ready = Ready(
        tp_rank=init.tp_rank,
        load_s=0.0,
        weight_bytes=0,
        kernels={},
        vocab_size=VOCABULARY,
        graph_factors=dict(graph_factors),
    )
    connection.sendall(frame(ready))
    last: Step | None = None
    while not isinstance(command := _receive(connection), Shutdown):
        if isinstance(command, DecodeOn):
            assert last is not None
            command = following(last, command)
        if isinstance(command, Step) and command.goes_on:
            last = command
        if (reply := reply_to(command, init, step_s, load)) is not None:
            connection.sendall(frame(reply))


def main(graph_factors: Mapping[str, str], load: Load = accept) -> None:
    """Serve as a rank that wants graphs of these factors; none: it wants no graphs."""
    parser = argparse.ArgumentParser(prog="tests.support.simulated_rank")
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step_s = float(os.environ.get("PRECAST_SIMULATED_STEP_MS", "0")) / 1e3
    with suppress(ConnectionError):  # the leader is gone
        serve(connection, step_s, graph_factors, load)


if __name__ == "__main__":
    main({})
