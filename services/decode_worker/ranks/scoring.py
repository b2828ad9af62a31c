"""Log-probabilities of tokens that are known: those of prompts.

Logits are made for a few rows at a time, and what is kept of them is a number for the token and for
the likeliest: a whole prompt's never exist at once.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precast.models.forward import logits
from precast.models.layers import Shape
from precast.models.load import Weights
from precast.ops.sampling import INTS, REALS, Columns, sample
from services.decode_worker.ranks.protocol import Logprobs, ScoredRows
from services.decode_worker.ranks.sampler import reports

PIECE: Final = 64
"""Rows at a time: 12 MB of logits where there are 49,152 tokens."""
_PLAIN: Final = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}


def score(
    shape: Shape, weights: Weights, hidden: Tensor, wanted: ScoredRows, *, reports_here: bool
) -> list[Logprobs | None]:
    """Of the wanted rows of hidden states [T, H]; every rank takes part, and gets nothing unless
    it ``reports_here``. None where logits are no numbers."""
    rows = torch.from_numpy(np.frombuffer(wanted.rows, dtype=np.int32).astype(np.int64))
    found: list[Logprobs | None] = []
    for piece in _pieces(len(rows)):
        part = logits(shape, weights, hidden[rows[piece]])
        reported = _reports(part, shape.vocab_widths, *_columns(wanted, piece))
        found += reported if reports_here else []
    return found


def _pieces(rows: int) -> Iterator[slice]:
    return (slice(first, first + PIECE) for first in range(0, rows, PIECE))


def _columns(wanted: ScoredRows, piece: slice) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    columns = (np.frombuffer(data, dtype=np.int32) for data in (wanted.tokens, wanted.tops))
    tokens, tops = (column[piece] for column in columns)
    return tokens, tops


def _reports(
    part: Tensor, widths: tuple[int, ...], tokens: NDArray[np.int32], tops: NDArray[np.int32]
) -> list[Logprobs | None]:
    """Of this rank's part of float32 [R, V] logits, which is changed."""
    reals = np.tile([_PLAIN.get(name, 0.0) for name in REALS], (len(tokens), 1))
    ints = np.zeros((len(tokens), len(INTS)), dtype=np.int64)
    ints[:, INTS.index("logprobs")] = tops
    ints[:, INTS.index("given")] = tokens
    columns = Columns(reals=torch.from_numpy(reals), ints=torch.from_numpy(ints))
    wanted: list[int] = tops.tolist()
    result = sample(part, columns, max(wanted), widths=widths)
    return reports(result, result.tokens.tolist(), wanted)
