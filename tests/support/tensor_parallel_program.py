"""Groups of real ranks that decode greedily: ``python -m tests.support.tensor_parallel_program``.

Forks the ranks, each of which runs the rank's own loop on its socket, so that a group costs a
fraction of a second. Prints as JSON what rank 0 answered, for each group size: tokens and, for
every other step, the log probabilities of the likeliest ones.
"""

import argparse
import json
import os
import signal
import socket
import traceback
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch

from precast.models.precision import Precision
from precast.system.process import die_with_parent
from precast.system.shared_memory import new_segment_name
from services.decode_worker.ranks import process as rank
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    Init,
    Join,
    Loaded,
    Loading,
    Ready,
    Reply,
    Shutdown,
    Step,
    StepDone,
    decode_reply,
    frame,
)
from tests.support.sampling import new_sampling

BLOCK = 16
PROMPTS = ((5, 9, 200, 31, 7, 7, 90), (17,), tuple(range(100, 119)))
DECODE_STEPS = 4
TOP = 5
PLAIN, REPORTED, CHANCE = range(3)
"""Slots of ways to draw: the likeliest token, that with log probabilities, and by chance."""
WAYS = (
    new_sampling(PLAIN, temperature=0.0),
    new_sampling(REPORTED, temperature=0.0, logprobs=TOP),
    new_sampling(CHANCE, temperature=1.0, seed=4),
)


def start(init: Init) -> socket.socket:
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    if os.fork() == 0:
        try:
            die_with_parent(signal.SIGKILL, parent)
            ours.close()
            with torch.inference_mode():
                rank.serve(theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    return ours


def reply(connection: socket.socket) -> Reply:
    (size,) = FRAME_HEADER.unpack(_read(connection, FRAME_HEADER.size))
    return decode_reply(_read(connection, size))


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise SystemExit("a rank died")
        data += part
    return data


def ints(values: Iterable[int]) -> bytes:
    return np.array(list(values), dtype=np.int32).tobytes()


def step(step_id: int, contexts: list[int], new: list[list[int]]) -> Step:
    """Sequence s has ``contexts[s]`` tokens in the cache and gets ``new[s]``; it has two blocks."""
    positions = [[past + i for i in range(len(n))] for past, n in zip(contexts, new, strict=True)]
    slots = [[s * 2 * BLOCK + at for at in own] for s, own in enumerate(positions)]
    lengths = [len(n) for n in new]
    # Of four steps, one needs no logits (ranks only compare their largest), and one draws for some
    # of the sequences, by chance for one.
    greedy = REPORTED if step_id % 2 == 0 else PLAIN
    mixed = step_id % 4 == 3
    sampling = [greedy, CHANCE, greedy] if mixed else [greedy] * len(new)
    return Step(
        step_id=step_id,
        token_ids=ints(chain(*new)),
        positions=ints(chain(*positions)),
        slots=ints(chain(*slots)),
        query_starts=ints([0, *np.cumsum(lengths)]),
        context_lens=ints([past + n for past, n in zip(contexts, lengths, strict=True)]),
        block_tables=ints([b for s in range(len(new)) for b in (2 * s, 2 * s + 1)]),
        block_table_width=2,
        sampling_slots=ints(sampling),
        draws=ints(draws_of(step_id)),
        drawn=ints([step_id] * len(new)),
        greedy=set(sampling) == {PLAIN},
    )


def draws_of(step_id: int) -> list[int]:
    """The first sequence of a mixed step draws nothing."""
    return [int(step_id % 4 != 3), *[1] * (len(PROMPTS) - 1)]


def generate(inits: list[Init]) -> tuple[dict[str, str], list[dict[str, object]]]:
    """One prefill, then decode steps: who served each operator, and what rank 0 said to each."""
    connections = [start(init) for init in inits]
    for connection, init in zip(connections, inits, strict=True):
        connection.sendall(frame(init))
    for connection in connections:
        while isinstance(loaded := reply(connection), Loading):
            pass
        assert isinstance(loaded, Loaded), loaded
    for connection in connections:
        connection.sendall(frame(Join()))
    ready = [reply(connection) for connection in connections]
    assert isinstance(ready[0], Ready), ready
    kernels = ready[0].kernels
    ways = b"".join(map(frame, WAYS))
    for connection in connections:
        connection.sendall(ways)
    answers: list[dict[str, object]] = []
    contexts, new = [0] * len(PROMPTS), [list(prompt) for prompt in PROMPTS]
    for index in range(1 + DECODE_STEPS):
        for connection in connections:
            connection.sendall(frame(step(index, contexts, new)))
        done = reply(connections[0])
        assert isinstance(done, StepDone), done
        tops = [entry.top_logprobs for entry in done.logprobs if entry is not None]
        answers.append({"tokens": done.token_ids, "top_logprobs": tops})
        contexts = [past + len(n) for past, n in zip(contexts, new, strict=True)]
        drawn = iter(done.token_ids)
        new = [[next(drawn) if draws else 0] for draws in draws_of(index)]
    for connection in connections:
        connection.sendall(frame(Shutdown()))
        connection.close()
    return kernels, answers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--provider", default="native")
    parser.add_argument("--weight-dtype", default="fp32")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-dtype", default="fp32")
    given = parser.parse_args(arguments)
    precision = Precision(
        weight_dtype=given.weight_dtype,
        quantization=given.quantization,
        head_quantization=given.quantization,
        kv_dtype=given.kv_dtype,
    )
    torch.set_num_threads(1)
    answers = {}
    for tp in map(int, given.tp.split(",")):
        group = new_segment_name()
        kernels, answers[tp] = generate(
            [
                Init(
                    model_dir=given.model_dir,
                    precision=precision,
                    tp_rank=index,
                    tp_size=tp,
                    cores=(-1,),
                    kv_blocks=2 * len(PROMPTS),
                    block_size=BLOCK,
                    max_batch_size=len(PROMPTS),
                    max_context_length=64,
                    group_id=group,
                    kernel_provider=given.provider,
                    packed_dir=f"{given.model_dir}-packed",
                )
                for index in range(tp)
            ]
        )
    print(json.dumps({"kernels": kernels, **answers}))


if __name__ == "__main__":
    main()
