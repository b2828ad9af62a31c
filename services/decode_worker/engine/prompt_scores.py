"""Which tokens of prompts a step gives log-probabilities of, and what becomes of them.

The row of a prompt's token scores the token behind it. So each of a prompt's chunks scores as many
tokens as it has, but the last one, whose row draws the output's first. What a prompt shares with
another is computed again where it has not been scored: only keys and values are kept of it.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import Logprobs, ScoredRows


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """Of one sequence in one step."""

    sequence: Sequence
    first: int
    """Position of the prompt whose row is the first."""
    count: int
    first_row: int
    """That row's number among the step's tokens."""

    @property
    def tokens(self) -> list[int]:
        """That are scored."""
        return self.sequence.prompt[self.first + 1 : self.first + 1 + self.count]


def scored_parts(sequences: Many[Sequence], counts: Many[int]) -> tuple[ScoredPart, ...]:
    """Of a step in which each sequence goes on by so many tokens."""
    starts = accumulate(counts, initial=0)
    parts = (
        _part(sequence, count, start)
        for sequence, count, start in zip(sequences, counts, starts, strict=False)
        if sequence.scores
    )
    return tuple(part for part in parts if part.count > 0)


def _part(sequence: Sequence, count: int, start: int) -> ScoredPart:
    first = max(sequence.computed, sequence.scored)
    last = min(sequence.computed + count, len(sequence.prompt) - 1)
    return ScoredPart(
        sequence=sequence,
        first=first,
        count=max(0, last - first),
        first_row=start + first - sequence.computed,
    )


def scored_rows(parts: Many[ScoredPart]) -> ScoredRows | None:
    """As the ranks get them."""
    if not parts:
        return None
    rows = np.concatenate([np.arange(p.first_row, p.first_row + p.count) for p in parts])
    tokens = np.concatenate([np.array(part.tokens) for part in parts])
    tops = np.repeat([p.sequence.prompt_logprobs for p in parts], [p.count for p in parts])
    return ScoredRows(*(column.astype(np.int32).tobytes() for column in (rows, tokens, tops)))


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """What one step gave of one prompt."""

    sequence: Sequence
    tokens: list[int]
    logprobs: list[Logprobs | None]
    """None: the model's logits are no numbers."""


def take_scores(parts: Many[ScoredPart], scores: Many[Logprobs | None]) -> list[PromptScores]:
    """Those of sequences that still run, in order. Raises ValueError for another number of them."""
    if len(scores) != sum(part.count for part in parts):
        raise ValueError(f"{len(scores)} scores for {sum(part.count for part in parts)} tokens")
    found, place = list[PromptScores](), 0
    for part in parts:
        mine = list(scores[place : place + part.count])
        place += part.count
        if part.sequence.alive:
            part.sequence.scored = part.first + part.count
            found.append(PromptScores(sequence=part.sequence, tokens=part.tokens, logprobs=mine))
    return found
