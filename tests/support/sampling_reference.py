"""Sampling as ``precast/ops/sampling.py`` defines it: one row, float64, sorted, in plain numpy."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precast.ops.sampling import ByRow, Columns

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Row:
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    seed: int = 0
    step: int = 0
    logprobs: int = -1
    given: int = -1
    seen: dict[int, int] = field(default_factory=dict)
    """Token to its count in the output; 0: in the prompt alone."""
    bias: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None


def columns(rows: list[Row], vocabulary: int) -> Columns:
    """The rows as the operator takes them."""
    reals = [
        [
            row.temperature,
            row.top_p,
            row.min_p,
            row.repetition_penalty,
            row.presence_penalty,
            row.frequency_penalty,
        ]
        for row in rows
    ]
    ints = [[row.top_k, _signed(row.seed), row.step, row.logprobs, row.given] for row in rows]
    masks, mask_rows = _masks(rows, vocabulary)
    return Columns(
        reals=torch.tensor(reals, dtype=torch.float64).view(-1, 6),
        ints=torch.tensor(ints, dtype=torch.int64).view(-1, 5),
        seen=_by_row([row.seen for row in rows], torch.int32),
        bias=_by_row([row.bias for row in rows], torch.float32),
        masks=masks,
        mask_rows=mask_rows,
    )


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed


def _by_row(entries: list[dict[int, int]] | list[dict[int, float]], dtype: torch.dtype) -> ByRow:
    starts = np.cumsum([0, *map(len, entries)])
    ids = [token for entry in entries for token in entry]
    values = [value for entry in entries for value in entry.values()]
    return ByRow(
        starts=torch.from_numpy(starts.astype(np.int64)),
        ids=torch.tensor(ids, dtype=torch.int32),
        values=torch.tensor(values, dtype=dtype),
    )


def _masks(rows: list[Row], vocabulary: int) -> tuple[Tensor | None, Tensor | None]:
    allowed = [row.allowed for row in rows if row.allowed is not None]
    if not allowed:
        return None, None
    bits = np.zeros((len(allowed), -(-vocabulary // 32) * 32), dtype=np.uint8)
    for mask, tokens in zip(bits, allowed, strict=True):
        mask[list(tokens)] = 1
    words = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    numbers = iter(range(len(allowed)))
    which = [-1 if row.allowed is None else next(numbers) for row in rows]
    return torch.from_numpy(words), torch.tensor(which, dtype=torch.int32)


def adjusted(logits: Floats, row: Row) -> Floats:
    """Behind penalties, bias and mask, rounded to float32 where the operator's are."""
    x = logits.copy()
    for token, count in row.seen.items():
        value = x[token]
        if row.repetition_penalty != 1:
            positive = value > 0
            value = value / row.repetition_penalty if positive else value * row.repetition_penalty
        if count:
            value -= row.presence_penalty + row.frequency_penalty * count
        with np.errstate(over="ignore"):  # a huge penalty is infinite in float32
            x[token] = np.float32(value)
    for token, bias in row.bias.items():
        x[token] = np.float32(x[token]) + np.float32(bias)
    if row.allowed is not None:
        forbidden = np.ones(len(x), dtype=bool)
        forbidden[list(row.allowed)] = False
        x[forbidden] = -np.inf
    return x


def softmax(x: Floats) -> Floats:
    weights: Floats = np.exp(x - x.max())
    return weights / weights.sum()


def log_softmax(x: Floats) -> Floats:
    shifted = x - x.max()
    scores: Floats = shifted - np.log(np.exp(shifted).sum())
    return scores


def kept(x: Floats, row: Row, slack: float) -> tuple[set[int], set[int]]:
    """Tokens that must be kept, and those that may be: they differ where a share is within
    ``slack`` of its bound. ``x`` are adjusted logits."""
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[x[order] > -np.inf]
    if row.top_k:
        order = order[: row.top_k]
    shares = softmax(x[order] / row.temperature)
    before = np.cumsum(shares) - shares
    first = np.arange(len(order)) == 0
    must = first | ((before < row.top_p - slack) & (shares >= shares[0] * row.min_p * (1 + slack)))
    may = first | ((before < row.top_p + slack) & (shares >= shares[0] * row.min_p * (1 - slack)))
    if row.top_p >= 1:  # whatever roundings make of the last shares
        must |= shares >= shares[0] * row.min_p * (1 + slack)
    return set(order[must].tolist()), set(order[may].tolist())


def uniform(seed: int, step: int) -> float:
    generator = np.random.Generator(np.random.Philox(key=seed, counter=step))
    return float(generator.random())


def interval(x: Floats, row: Row, tokens: set[int], token: int) -> tuple[float, float]:
    """The numbers in [0, 1) for which ``token`` is drawn when ``tokens`` are kept."""
    ids = np.array(sorted(tokens))
    cumulative = np.concatenate(([0.0], np.cumsum(softmax(x[ids] / row.temperature))))
    at = int(np.searchsorted(ids, token))
    return float(cumulative[at]), float(cumulative[at + 1])
