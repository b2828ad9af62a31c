"""Ranks that draw from parts of a vocabulary: ``python -m tests.support.split_sampling_program``.

Each of a group's ranks draws batches of random logits together with the others, and by itself from
all of them. Prints what differs.
"""

import argparse
import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from precast.ops import native
from precast.ops.sampling import Drawings, sample
from tests.support.collective_program import start, wait
from tests.support.sampling_reference import Row, columns

SPREADS = (0.0, 0.3, 3.0, 30.0)
"""Of logits: all alike, flat, as a model's, peaked."""
TOP = 8


def widths_of(draw: random.Random, ranks: int) -> list[int]:
    """Parts of a vocabulary: as they are dealt, or very uneven."""
    return [draw.choice((1, 16, 48, 144, 1600)) for _ in range(ranks)]


def row_of(draw: random.Random, vocabulary: int) -> Row:
    tokens = range(vocabulary)
    some = draw.sample(tokens, min(vocabulary, draw.choice((0, 3, 40))))
    return Row(
        temperature=draw.choice((0.0, 0.3, 1.0, 1.0, 2.0)),
        top_p=draw.choice((1.0, 1.0, 0.0, 0.5, 0.9, 0.99)),
        min_p=draw.choice((0.0, 0.0, 0.05, 1.0)),
        top_k=draw.choice((0, 0, 1, 7, 40, 500)),
        repetition_penalty=draw.choice((1.0, 1.3)),
        presence_penalty=draw.choice((0.0, 0.5)),
        seed=draw.getrandbits(64),
        step=draw.randrange(1000),
        logprobs=draw.choice((-1, 0, 5, TOP)),
        given=draw.choice((-1, -1, -1, draw.choice(tokens))),
        seen={token: draw.randrange(3) for token in some},
        bias={token: draw.uniform(-3, 3) for token in some[::2]},
        allowed=draw.choice((None, None, frozenset(draw.choices(tokens, k=30)), frozenset())),
    )


def logits_of(draw: random.Random, rows: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    x = torch.randn(rows, vocabulary, generator=generator) * draw.choice(SPREADS)
    if draw.random() < 0.3:
        x = x.round()  # ties
    if draw.random() < 0.1:
        x[draw.randrange(rows), draw.randrange(vocabulary)] = float("nan")
    return x


def differences(ours: Drawings, whole: Drawings) -> list[str]:
    return [
        name
        for name in ("status", "tokens", "top_ids")
        if not torch.equal(getattr(ours, name), getattr(whole, name))
    ] + [
        name
        for name in ("logprobs", "top_logprobs")
        if not torch.allclose(getattr(ours, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    ]


def check(rank: int, ranks: int, batches: int) -> None:
    native.start_threads((-1,))
    draw = random.Random(ranks)
    for number in range(batches):
        widths = widths_of(draw, ranks)
        vocabulary, first = sum(widths), sum(widths[:rank])
        rows = [row_of(draw, vocabulary) for _ in range(draw.choice((1, 3, 16)))]
        logits = logits_of(draw, len(rows), vocabulary)
        part = logits[:, first : first + widths[rank]].clone()
        made = columns(rows, vocabulary)
        ours, whole = sample(part, made, TOP, widths=widths), sample(logits, made, TOP)
        if wrong := differences(ours, whole):
            raise AssertionError(f"batch {number}, widths {widths}: {wrong}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, default=200)
    given = parser.parse_args(arguments)
    pids = start(given.ranks, lambda rank, ranks: check(rank, ranks, given.batches))
    return int(any(wait(pids)))


if __name__ == "__main__":
    sys.exit(main())
