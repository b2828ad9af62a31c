"""How many tokens to draft for which sequences of a step, and whether to wait for what is drawn."""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from typing import Final

from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.speculation import MOST, Drafting, Sizes, lengths

MANY: Final = 8
"""Sequences of which some have always something that can be guessed."""


class Drafter:
    def __init__(
        self, pace: Pace, graph_sizes: Sizes | None, left: Callable[[Sequence], int]
    ) -> None:
        """``graph_sizes``: steps are filled up to one of them; None: nothing is drafted. ``left``:
        tokens that a sequence may have after those that are being drawn."""
        self._pace = pace
        self._graph_sizes = graph_sizes
        self._left = left
        self.drafted = self.accepted = 0
        """Tokens of drafts so far, and those of them that were right."""

    def begin(self, sequence: Sequence) -> None:
        """A sequence is new."""
        plain = not sequence.sampling.looks_back and sequence.matcher is None
        if self._graph_sizes is not None and plain:
            sequence.drafting = Drafting()

    def awaits_draws(self, running: list[Sequence]) -> bool:
        """Whether it is worth waiting for what is drawn now: drafts may follow it. How many tokens
        of one were right has to be known in any case."""
        if any(sequence.drafted for sequence in running):
            return True
        drawing = [s for s in running if s.drawing and s.to_prefill == 0]
        return self.may_follow(drawing, prompts=any(s.to_prefill for s in running))

    def may_follow(self, drawing: Many[Sequence], *, prompts: bool = False) -> bool:
        """Whether drafts may follow what these sequences draw now; ``prompts`` as of ``counts``."""
        return bool(drawing) and any(self.counts(drawing, skip=1, prompts=prompts))

    def counts(
        self, decoding: Many[Sequence], skip: int = 0, *, prompts: bool = False
    ) -> list[int]:
        """How many tokens to draft for each; the first ``skip`` of what is guessed are being
        drawn. ``prompts``: in a step that goes on with some too."""
        none = [0] * len(decoding)
        sizes = self._graph_sizes() if self._graph_sizes is not None and decoding else ()
        if len(decoding) >= max(sizes, default=0):
            return none
        guesses = [self._guessed(s, skip) if s.drawing == skip else 0 for s in decoding]
        if not any(guesses):
            return none
        rates = [s.drafting.rate if s.drafting is not None else 0.0 for s in decoding]
        costs = self._pace.decode_costs(len(decoding), sizes, prompts=prompts)
        return lengths(list(zip(rates, guesses, strict=True)), len(decoding), costs)

    def watched(self, decoding: Many[Sequence]) -> list[tuple[int, Drafting]] | None:
        """Of those whose next tokens may be guessed once more of them are known, with their places.
        None: some can be now. Nobody is watched where no draft would pay, whatever is guessed."""
        sizes = self._graph_sizes() if self._graph_sizes is not None else ()
        if len(decoding) >= max(sizes, default=0) or not self._may_pay(decoding, sizes):
            return []
        if any(sequence.draft(2) for sequence in decoding):
            return None
        return [(at, s.drafting) for at, s in enumerate(decoding) if s.drafting is not None]

    def checked(self, sequence: Sequence, drafted: int, right: int) -> None:
        """What follows the tokens of a draft that were right was not computed."""
        assert sequence.drafting is not None
        sequence.drafted = 0
        sequence.computed -= drafted - right
        self.drafted += drafted
        self.accepted += right
        sequence.drafting.observe(drafted, right)

    def _may_pay(self, decoding: Many[Sequence], sizes: Collection[int]) -> bool:
        """Whether any token would be drafted if all could be guessed. Among 16 sequences some
        have nearly always what can be, and to look at it in each step, for nothing, took 5 to 8 %
        of the throughput. Few are looked at in any case: what pays changes within a run."""
        if len(decoding) < MANY:
            return True
        costs = self._pace.decode_costs(len(decoding), sizes)
        longest = [(s.drafting.rate, MOST) for s in decoding if s.drafting is not None]
        return not costs or any(lengths(longest, len(decoding), costs))

    def _guessed(self, sequence: Sequence, skip: int) -> int:
        """Tokens of a draft that may follow the next token."""
        most = min(MOST, self._left(sequence) - 1)
        return max(0, len(sequence.draft(most + skip)) - skip)
