"""Which sequences may be what ends the ranks.

A sequence was perhaps the cause if it was in the step in which the ranks were lost. One that has
got a token since its last loss starts afresh, for ranks may also be killed by others. One that was
lost twice without a token between is a suspect: it goes on alone until it has got one, so that it
takes nobody with it. After ``MAX_LOSSES`` in a row, or ``MAX_LOSSES_IN_ALL``, it is given up.
"""

from collections.abc import Iterable
from typing import Final

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.step import Chosen

MAX_LOSSES: Final = 3
"""In a row, without a token between."""
MAX_LOSSES_IN_ALL: Final = 16
_SUSPECT_FROM: Final = 2
"""Losses in a row."""


def note_loss(sequence: Sequence) -> None:
    """The ranks were lost in a step with the sequence in it."""
    if len(sequence.output) > sequence.output_at_loss:
        sequence.losses = 0
    sequence.losses += 1
    sequence.losses_in_all += 1
    sequence.output_at_loss = len(sequence.output)


def is_given_up(sequence: Sequence) -> bool:
    return sequence.losses >= MAX_LOSSES or sequence.losses_in_all >= MAX_LOSSES_IN_ALL


def first_suspect(sequences: Iterable[Sequence]) -> Sequence | None:
    return next((one for one in sequences if is_suspect(one)), None)


def is_suspect(sequence: Sequence) -> bool:
    proven = len(sequence.output) > sequence.output_at_loss
    return sequence.losses >= _SUSPECT_FROM and not proven


def alone(suspect: Sequence, chunk: int) -> list[Chosen]:
    """Its part in a step that has nothing else, of ``chunk`` tokens at most; none while the token
    that may prove it is being drawn."""
    if suspect.drawing:
        return []
    return [Chosen(suspect, min(max(1, suspect.to_prefill), chunk))]
