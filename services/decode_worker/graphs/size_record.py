"""What the graph manager remembers of one size: its state, what was tried, and what was refused."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Final

from services.decode_worker.graphs.candidates import Candidate, Identity
from services.decode_worker.graphs.size_state import (
    ABSENT,
    Acceptable,
    SizeState,
    newest,
    offered,
    reviewed,
)

FIRST_REPLAYS: Final = 16
"""A crash in the first so many replays of a graph is the graph's own."""
MAX_ATTEMPTS: Final = 4
MAX_REFUSED: Final = 32


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A candidate that ranks have begun to load, and how it did."""

    candidate: Candidate
    replays: int = 0
    """Counted up to FIRST_REPLAYS."""
    deaths: int = 0
    """How often the ranks ended, without a crash, before its first replay was over."""


@dataclass(frozen=True, kw_only=True)
class SizeRecord:
    """All of it is bounded, and goes when nobody wants the size any more."""

    state: SizeState = field(default=ABSENT)
    attempts: tuple[Attempt, ...] = ()
    """The newest last: what to go back to."""
    refused: tuple[Identity, ...] = ()
    """Never to be loaded again by this worker; the newest last."""
    missed: int = 0
    """Steps that would have replayed a graph of this size since there was none."""

    def attempt(self, candidate: Candidate) -> Attempt:
        """How a candidate has done so far."""
        for attempt in self.attempts:
            known = attempt.candidate
            if known is candidate or known.identity == candidate.identity:
                return attempt
        return Attempt(candidate=candidate)

    def with_attempt(self, attempt: Attempt) -> "SizeRecord":
        """With what is known of a candidate now; its place in the order does not change."""
        identity = attempt.candidate.identity
        attempts = tuple(
            attempt if known.candidate.identity == identity else known for known in self.attempts
        )
        if attempt not in attempts:
            attempts = (*attempts, attempt)[-MAX_ATTEMPTS:]
        return replace(self, attempts=attempts)

    def refusing(self, candidate: Candidate) -> "SizeRecord":
        others = tuple(known for known in self.refused if known != candidate.identity)
        return replace(self, refused=(*others, candidate.identity)[-MAX_REFUSED:])

    def forgetting(self, artifacts: Collection[tuple[str, int]]) -> "SizeRecord":
        """Without attempts at these artifacts."""
        kept = tuple(
            attempt
            for attempt in self.attempts
            if not set(artifacts) & set(attempt.candidate.identity)
        )
        return replace(self, attempts=kept)

    def accepting(self, artifacts: Collection[tuple[str, int]]) -> "SizeRecord":
        """With nothing refused that has these artifacts in it."""
        kept = tuple(known for known in self.refused if not set(artifacts) & set(known))
        return replace(self, refused=kept)

    def going_back(self, acceptable: Acceptable) -> "SizeRecord":
        """With the newest candidate pending that ran before, where nothing else is to come."""
        state = reviewed(self.state, acceptable)
        if newest(state) is None:
            for attempt in reversed(self.attempts):
                if attempt.replays and acceptable(attempt.candidate):
                    return replace(self, state=offered(state, attempt.candidate))
        return replace(self, state=state)
