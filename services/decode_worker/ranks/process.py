"""One tensor-parallel rank: ``python -m services.decode_worker.ranks.process --fd N``.

Reads commands from its leader's socket and computes. It holds no state that a step doesn't name but
weights, KV cache, graphs and how its sequences draw, and lives and dies with its leader.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from precast import log as logging
from precast.errors import PrecastError
from precast.models.forward import likeliest
from precast.ops import native
from precast.ops.draw_status import DrawStatus
from precast.system.process import die_with_parent, pin
from services.decode_worker.ranks import model as rank_model
from services.decode_worker.ranks.model import RankModel
from services.decode_worker.ranks.pooling import pool
from services.decode_worker.ranks.prepared import Prepared, RunningBatch, prepare
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Command,
    DecodeOn,
    DropGraph,
    GraphLoaded,
    Init,
    Join,
    Loaded,
    LoadGraph,
    Loading,
    Logprobs,
    Masks,
    Ping,
    Pong,
    RankFailed,
    Ready,
    Reply,
    Shutdown,
    StartSampling,
    Step,
    StepDone,
    decode_command,
    frame,
)
from services.decode_worker.ranks.sampler import DrawMasks, Drawn, Ints, Sampler, draw_masks
from services.decode_worker.ranks.scoring import score

WATCH_S = 0.001
"""How long a rank looks for the next command before it sleeps. Woken from sleep, ranks begin a step
at different times and wait for each other: steps of two ranks take 1 % less this way."""
GROUP_TIMEOUT_S = 60.0
"""Longest wait for a peer in a collective. A dead peer is noticed at once, by its process state."""


def receive(connection: socket.socket) -> Command:
    """The next command; Shutdown when the leader is gone. Raises ValueError for a broken frame."""
    _watch(connection)
    return _command(connection, _read(connection, FRAME_HEADER.size))


def receive_init(connection: socket.socket) -> tuple[Command, int | None]:
    """The first command, as ``receive`` has it, and the file that came with it."""
    first, files, _, _ = socket.recv_fds(connection, 1, 1)
    rest = _read(connection, FRAME_HEADER.size - 1) if first else None
    header = None if rest is None else first + rest
    return _command(connection, header), next(iter(files), None)


def _command(connection: socket.socket, header: bytes | None) -> Command:
    if header is None:
        return Shutdown()
    (size,) = FRAME_HEADER.unpack(header)
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {size} bytes")
    body = _read(connection, size)
    return Shutdown() if body is None else decode_command(body)


def _watch(connection: socket.socket) -> None:
    """Looks for bytes until there are some, for WATCH_S at the most; others may have the core."""
    until = time.perf_counter() + WATCH_S
    while time.perf_counter() < until:
        try:
            connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            os.sched_yield()
        else:
            return


def _read(connection: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if count == 0:
            return None
        filled += count
    return bytes(buffer)


def serve(connection: socket.socket) -> None:
    """Runs commands until Shutdown. Raises PrecastError or RuntimeError when it can't go on."""
    init, kv_file = receive_init(connection)
    if isinstance(init, Shutdown):
        return
    if not isinstance(init, Init):
        raise ValueError(f"expected Init, got {type(init).__name__}")
    logging.configure("rank", init)  # whose handler outlives a disk that is full
    if init.cpus:
        pin(init.cpus)  # threads that are started from now on, unless they have a core each
    native.start_threads(init.cores, near=init.cpus)

    def report(done: int, total: int) -> None:
        _send(connection, Loading(tp_rank=init.tp_rank, done=done, total=total))

    model = rank_model.load(init, report, kv_file)
    _send(connection, Loaded(tp_rank=init.tp_rank))
    rank = _Rank(
        model=model,
        sampler=Sampler(
            slots=init.max_batch_size,
            widths=model.shape.vocab_widths,
            reports=init.tp_rank == 0,
        ),
        last=np.zeros(init.max_batch_size, dtype=np.int32),
        receive=partial(receive, connection),
    )
    while not isinstance(command := receive(connection), Shutdown):
        reply = _run(init, rank, command)
        if reply is not None:
            _send(connection, reply)


@dataclass(kw_only=True)
class _Rank:
    model: RankModel
    sampler: Sampler
    last: Ints
    """[slots] the token that was drawn last for each."""
    receive: Callable[[], Command]
    running: RunningBatch | None = None
    """What ``DecodeOn`` goes on with."""


def _run(init: Init, rank: _Rank, command: object) -> Reply | None:
    model = rank.model
    if isinstance(command, Step | DecodeOn):
        return _step(init, rank, command)
    if isinstance(command, StartSampling):
        rank.sampler.start(command)
        return None
    if isinstance(command, LoadGraph):
        return _load_graph(init, model, command)
    if isinstance(command, Ping):
        return Pong(tp_rank=init.tp_rank)
    if isinstance(command, Join):
        return _join(init, model)
    if isinstance(command, DropGraph):
        (model.trials if command.trial else model.graphs).pop(command.num_tokens, None)
        return None
    raise ValueError(f"unexpected command {type(command).__name__}")


def _join(init: Init, model: RankModel) -> Ready:
    if init.tp_size > 1:
        native.join_group(init.group_id, init.tp_rank, init.tp_size, GROUP_TIMEOUT_S)
    return Ready(
        tp_rank=init.tp_rank,
        load_s=model.load_s,
        weight_bytes=model.weights.nbytes(),
        vocab_size=model.vocab_size,
        kernels=model.kernels,
        graph_factors=model.factors,
        content=model.content,
    )


def _load_graph(init: Init, model: RankModel, command: LoadGraph) -> GraphLoaded:
    error, load_ms = None, 0.0
    try:
        path = Path(command.paths[init.tp_rank])
        load_ms = model.load_graph(command.num_tokens, path, trial=command.trial)
    except PrecastError as refused:
        error = str(refused)
    return GraphLoaded(
        tp_rank=init.tp_rank, num_tokens=command.num_tokens, load_ms=load_ms, error=error
    )


def _step(init: Init, rank: _Rank, step: Step | DecodeOn) -> StepDone | None:
    started = time.perf_counter()
    prepared = _prepared(init, rank, step)
    batch, draws, _ = prepared
    rank.model.choose_adapters(batch)
    scores: list[Logprobs | None] = []
    shadow, pooled = None, b""
    if isinstance(step, Step) and step.shows_hidden:
        hidden = rank.model.hidden(batch)
        scores, pooled = _looked_at(init, rank.model, step, hidden)
        logits = rank.model.logits(batch, draws.rows, hidden)
    elif step.shadow:
        logits, shadow = rank.model.shadow(batch, draws.rows, step.graph_size)
    else:
        logits = rank.model.step(batch, draws.rows, step.graph_size)
    drawn = _draw(rank, step, prepared, logits)
    rank.last[draws.slots] = np.maximum(drawn.tokens, 0)  # of one without a token any will do
    if init.tp_rank != 0:
        return None
    return StepDone(
        token_ids=drawn.tokens,
        logprobs=tuple(drawn.logprobs) if any(drawn.logprobs) else (),
        step_us=int((time.perf_counter() - started) * 1e6),
        failed=drawn.failed,
        scores=tuple(scores),
        pooled=pooled,
        shadow=shadow,
    )


def _looked_at(
    init: Init, model: RankModel, step: Step, hidden: Tensor
) -> tuple[list[Logprobs | None], bytes]:
    """What is reported of the hidden states [T, H], by the first rank: scores of tokens, sums."""
    scores, pooled, reports_here = list[Logprobs | None](), b"", init.tp_rank == 0
    if step.scored is not None:
        scores = score(model.shape, model.weights, hidden, step.scored, reports_here=reports_here)
    if step.pooled is not None and reports_here:  # all ranks have them whole
        pooled = pool(model.shape, model.weights, hidden, step.pooled)
    return scores, pooled


def _prepared(init: Init, rank: _Rank, step: Step | DecodeOn) -> Prepared:
    if isinstance(step, DecodeOn):
        if rank.running is None:
            raise ValueError("there is no step to decode on from")
        return rank.running.next(step, rank.last)
    prepared = prepare(step, rank.last)
    if step.goes_on:
        rank.running = RunningBatch(prepared, init.block_size)
    return prepared


def _draw(rank: _Rank, step: Step | DecodeOn, prepared: Prepared, logits: Tensor) -> Drawn:
    """What is drawn in this step: every rank knows it, for it goes on from there. ``logits`` has a
    row for each draw."""
    draws = prepared.draws
    if len(draws.rows) == 0:
        return Drawn(tokens=[], logprobs=[], failed={})
    if prepared.greedy:
        return _greedy(likeliest(rank.model.shape, logits))
    return rank.sampler.draw(logits, draws.slots, draws.drawn, _masks(rank, step, len(draws.rows)))


def _masks(rank: _Rank, step: Step | DecodeOn, draws: int) -> DrawMasks | None:
    """The leader has sent them while this step was computed, or is about to."""
    if isinstance(step, DecodeOn) or not step.masked:
        return None
    places = np.frombuffer(step.masked, dtype=np.int32)
    message = rank.receive()
    if isinstance(message, Shutdown):
        raise BrokenPipeError
    if not isinstance(message, Masks) or message.step_id != step.step_id:
        raise ValueError(f"expected masks of step {step.step_id}, got {message!r:.100}")
    return draw_masks(message, places, draws)


def _greedy(tokens: list[int]) -> Drawn:
    lost = [row for row, token in enumerate(tokens) if token < 0]
    return Drawn(
        tokens=tokens,
        logprobs=[None] * len(tokens),
        failed=dict.fromkeys(lost, int(DrawStatus.NOT_FINITE)),
    )


def _send(connection: socket.socket, message: Reply) -> None:
    connection.sendall(frame(message))


def run(connection: socket.socket) -> int:
    """A rank's whole life; returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides when ranks stop
    try:
        with torch.inference_mode():
            serve(connection)
    except (PrecastError, RuntimeError, ValueError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        refused = isinstance(error, PrecastError)
        connection.sendall(frame(RankFailed(tp_rank=-1, message=lines[0], refused=refused)))
        return 1
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the leader is gone
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="services.decode_worker.ranks.process")
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent(signal.SIGKILL)
    return run(connection)


if __name__ == "__main__":
    # The pool's threads and torch's are still there: skip their teardown.
    code = main()
    sys.stdout.flush()
    os._exit(code)
