"""Drafts of what a sequence goes on with, out of what it has said or was told already.

Prompt lookup decoding (Saxena, 2023): where a sequence's last tokens were before, what followed
there is likely to follow again, as when code is edited or a given text is quoted. A step computes
the draft's tokens behind the last one; the tokens that are drawn decide how many of them count, so
that a sequence gets the very tokens that it would get one by one.

How long drafts are follows from how many of a sequence's were right, and from what steps take
(``pace.py``): a step of more tokens has to pay. Where none does, nothing is drafted, and no step
waits.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

NGRAM: Final = 3
"""Last tokens that are looked for."""
PLACES: Final = 16
"""Places that are compared."""
ALIKE: Final = 32
"""Tokens before them by which they are."""
MOST: Final = 15
"""Tokens of a draft: with the last one they fill a graph of 16."""
FIRST_RATE: Final = 0.6
"""Of drafted tokens that are right, before anything is known."""
_WEIGHT: Final = 0.3
"""Of the newest draft in that."""
LOW_RATE: Final = 0.15
PAUSE: Final = 32
"""Tokens for which a sequence is not drafted whose drafts are mostly wrong."""
MIN_GAIN: Final = 1.05
"""Tokens a second with drafts to those without: estimates are rough."""

Sizes = Callable[[], Collection[int]]
"""Numbers of tokens that there are graphs for."""


class PromptLookup:
    """The tokens of one sequence, and where each ``NGRAM`` of them was lately."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], list[int]] = {}
        """Where what follows begins: of each the ``PLACES`` last ones."""
        self._found: tuple[int, int | None] = (-1, None)
        """The length for which it was looked up last, and what was found."""

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._tokens) >= NGRAM:
                places = self._followed.setdefault(tuple(self._tokens[-NGRAM:]), [])
                places.append(len(self._tokens))
                if len(places) > PLACES:
                    del places[0]
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """What followed the last tokens where most before it was the same too, as if that went
        round for ever; empty if they weren't there."""
        if self._found[0] != len(self._tokens):
            self._found = len(self._tokens), self._place()
        start = self._found[1]
        if start is None or most < 1:
            return []
        followed = self._tokens[start : start + most]
        return (followed * -(-most // len(followed)))[:most]

    def _place(self) -> int | None:
        places = self._followed.get(tuple(self._tokens[-NGRAM:]), ())
        return max(places, key=lambda place: (self._alike(place), place), default=None)

    def _alike(self, place: int) -> int:
        """How many tokens before the place are the last ones; as far as that matters."""
        tokens, end, count = self._tokens, len(self._tokens), NGRAM
        while count < min(ALIKE, place) and tokens[place - 1 - count] == tokens[end - 1 - count]:
            count += 1
        return count


@dataclass(kw_only=True)
class Drafting:
    """How one sequence is drafted."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    rate: float = FIRST_RATE
    pause_until: int = 0
    """Its length from which it is drafted again."""

    def draft(self, most: int) -> list[int]:
        return self.lookup.draft(most) if self.lookup.length >= self.pause_until else []

    def observe(self, drafted: int, right: int) -> None:
        """A draft was checked: its first ``right`` tokens were those that were drawn."""
        tried = min(drafted, right + 1)
        self.rate += _WEIGHT * (right / tried - self.rate)
        if self.rate < LOW_RATE:
            self.pause_until = self.lookup.length + PAUSE
            self.rate = FIRST_RATE / 2


def lengths(
    drafts: Sequence[tuple[float, int]], decoding: int, costs: Mapping[int, float]
) -> list[int]:
    """How much of each draft to compute in a step of ``decoding`` sequences.

    ``drafts``: the rate and the length of each. ``costs``: what steps take by their tokens, of
    ``decoding`` and of larger sizes to choose from. That which gives most tokens for its time is
    filled, as far as the drafts reach.
    """
    # In falling order each draft's tokens come from its front, for they are ever less likely.
    likely = sorted(
        (
            (rate ** (at + 1), index)
            for index, (rate, most) in enumerate(drafts)
            for at in range(most)
        ),
        reverse=True,
    )
    best, gain = 0, MIN_GAIN
    for size, cost in costs.items():
        more = min(size - decoding, len(likely))
        tokens = decoding + sum(chance for chance, _ in likely[:more])
        speed = tokens / decoding * costs[decoding] / cost
        if speed > gain:
            best, gain = more, speed
    counts = [0] * len(drafts)
    for _, index in likely[:best]:
        counts[index] += 1
    return counts
