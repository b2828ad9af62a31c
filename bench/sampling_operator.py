"""Drawing tokens: the operator against the sort it replaced, alternating.

    python -m bench.sampling_operator [--rows 1,16] [--vocabularies 49152,151936] [--spread 3]

Prints medians of microseconds for a batch, beside reading its logits once. Logits are normal with
the given spread: with 1 (flat), top_p 0.9 keeps half of the vocabulary; with 3, some hundreds. The
baseline is what the decode worker did until version 0.2: rows one by one, torch's sort and softmax.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from bench.figures import record
from precast.ops import native
from precast.ops.sampling import INTS, REALS, ByRow, Columns, sample
from precast.system.process import available_cpus

ROUNDS: Final = 60
SEEN: Final = 300
"""Distinct tokens that penalties apply to."""
TOP: Final = 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    name: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    penalties: bool = False
    biases: int = 0
    """Entries of logit_bias."""
    logprobs: int = -1


KINDS: Final = (
    Kind(name="greedy", temperature=0.0),
    Kind(name="temperature 1"),
    Kind(name="top_p 0.9", top_p=0.9),
    Kind(name="top_k 50", top_k=50),
    Kind(name="top_k 50, top_p 0.9", top_k=50, top_p=0.9),
    Kind(name="min_p 0.05", min_p=0.05),
    Kind(name="all penalties, top_p 0.9", top_p=0.9, penalties=True),
    Kind(name="20 logprobs", logprobs=TOP),
    Kind(name="49,000 biases", biases=49_000),
)


def columns(kind: Kind, rows: int) -> Columns:
    penalty = 1.1 if kind.penalties else 1.0
    reals = dict.fromkeys(REALS, 0.1 * kind.penalties)
    reals |= {"temperature": kind.temperature, "top_p": kind.top_p, "min_p": kind.min_p}
    reals |= {"repetition_penalty": penalty}
    ints = dict.fromkeys(INTS, 0) | {"top_k": kind.top_k, "logprobs": kind.logprobs, "given": -1}
    return Columns(
        reals=torch.tensor([[reals[name] for name in REALS]] * rows, dtype=torch.float64),
        ints=torch.tensor([[ints[name] for name in INTS]] * rows),
        seen=by_row(SEEN, rows, torch.int32) if kind.penalties else None,
        bias=by_row(kind.biases, rows, torch.float32) if kind.biases else None,
    )


def by_row(entries: int, rows: int, dtype: torch.dtype) -> ByRow:
    return ByRow(
        starts=torch.arange(rows + 1) * entries,
        ids=torch.arange(entries, dtype=torch.int32).repeat(rows),
        values=torch.ones(rows * entries, dtype=dtype),
    )


def sorted_row(row: Tensor, kind: Kind, seen: Tensor) -> int:
    """One row as the old sampler drew it."""
    if kind.penalties:
        row[seen] -= 0.2
    for token in range(kind.biases):
        row[token] += 1.0
    if kind.temperature == 0:
        return int(row.argmax())
    if kind.top_k:
        values, ids = row.topk(kind.top_k)
    elif kind.top_p < 1:
        values, ids = row.sort(descending=True, stable=True)
    else:
        values, ids = row, torch.empty(0)
    shares = torch.softmax(values.double() / kind.temperature, dim=-1)
    if kind.top_p < 1:
        shares = torch.where(shares.cumsum(-1) - shares < kind.top_p, shares, 0.0)
    cumulative = shares.cumsum(-1)
    target = float(np.random.Generator(np.random.Philox(key=1)).random()) * float(cumulative[-1])
    at = min(int(torch.searchsorted(cumulative, target, right=True)), len(values) - 1)
    if kind.logprobs >= 0:
        torch.log_softmax(row, dim=-1).topk(kind.logprobs)
    return at if ids.numel() == 0 else int(ids[at])


def sorted_rows(logits: Tensor, kind: Kind) -> list[int]:
    seen = torch.arange(SEEN)
    return [sorted_row(row, kind, seen) for row in logits]


def microseconds(logits: Tensor, run: Callable[[Tensor], object]) -> float:
    fresh = logits.clone()
    started = time.perf_counter()
    run(fresh)
    return (time.perf_counter() - started) * 1e6


def measure(kind: Kind, logits: Tensor) -> list[float]:
    """Medians: the operator, the sort, and reading the logits."""
    made, top = columns(kind, logits.shape[0]), max(0, kind.logprobs)
    runs: Sequence[Callable[[Tensor], object]] = (
        lambda x: sample(x, made, top),
        partial(sorted_rows, kind=kind),
        lambda x: torch.ops.precast.read_memory(x.view(torch.int64)),
    )
    rounds = 2 if kind.biases else ROUNDS  # the old one takes a second a row
    times = [[microseconds(logits, run) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--vocabularies", default="49152,151936")
    parser.add_argument("--spread", type=float, default=3.0)
    arguments = parser.parse_args()
    cores = available_cpus()
    native.start_threads(cores)
    headings = ["vocabulary", "rows", "draw", "operator us", "sort us", "reading us"]
    found: list[list[object]] = []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for vocabulary in map(int, arguments.vocabularies.split(",")):
            for rows in map(int, arguments.rows.split(",")):
                logits = torch.randn(rows, vocabulary, generator=generator) * arguments.spread
                for kind in KINDS:
                    figures = [f"{time_us:.0f}" for time_us in measure(kind, logits)]
                    found.append([vocabulary, rows, kind.name, *figures])
    record("sampling_operator", headings, found)


if __name__ == "__main__":
    main()
