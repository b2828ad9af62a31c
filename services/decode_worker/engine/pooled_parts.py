"""Which hidden states of prompts a step adds up for embeddings, and what becomes of the sums.

As where prompts are scored (``prompt_scores.py``), what a prompt shares with another is computed
again where its hidden states are wanted: only keys and values are kept of it.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import PooledRows


@dataclass(frozen=True, kw_only=True)
class PooledPart:
    """Of one sequence in one step."""

    sequence: Sequence
    first: int
    """Position in the prompt."""
    count: int
    first_row: int
    """Its first token's number among the step's."""


def pooled_parts(sequences: Many[Sequence], counts: Many[int]) -> tuple[PooledPart, ...]:
    """Of a step in which each sequence goes on by so many tokens."""
    if all(sequence.pooling is None for sequence in sequences):
        return ()
    starts = accumulate(counts, initial=0)
    found = map(_part, sequences, counts, starts)
    return tuple(part for part in found if part is not None and part.count > 0)


def _part(sequence: Sequence, count: int, start: int) -> PooledPart | None:
    if sequence.pooling is None:
        return None
    first = max(sequence.computed, sequence.pooling.taken)
    last = min(sequence.computed + count, len(sequence.prompt))
    return PooledPart(
        sequence=sequence,
        first=first,
        count=last - first,
        first_row=start + first - sequence.computed,
    )


def pooled_rows(parts: Many[PooledPart]) -> PooledRows | None:
    """As the ranks get them."""
    if not parts:
        return None
    columns = ([part.first_row for part in parts], [part.count for part in parts])
    return PooledRows(*(np.array(column, dtype=np.int32).tobytes() for column in columns))


def take_sums(parts: Many[PooledPart], sums: bytes) -> Iterator[Sequence]:
    """Adds what a step gave, float64 [P, H], to its sequences' vectors; gives those whose hidden
    states are no numbers."""
    if not parts:
        return
    rows = np.frombuffer(sums, dtype=np.float64).reshape(len(parts), -1)
    for part, row in zip(parts, rows, strict=True):
        if not part.sequence.alive or part.sequence.pooling is None:
            continue
        if np.isfinite(row).all():
            part.sequence.pooling.take(part.first, part.count, row)
        else:
            yield part.sequence
