"""Finds stop strings in text that comes in pieces.

Each string is looked for with the Knuth-Morris-Pratt automaton, whose table grows only as far as
text has matched: a character costs the same whatever the strings' lengths are, and a string that
never begins to match costs no memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Match:
    """A stop string in a piece of text."""

    end: int
    """Where it ends in the piece."""
    text: str
    """The whole string, which may have begun in an earlier piece."""


class _Automaton:
    """Where the text stands in one stop string."""

    def __init__(self, stop: str) -> None:
        self.stop: Final = stop
        self.matched = 0
        """Characters of the stop string with which the text ends."""
        self._table = [0]
        """For each length: the longest proper beginning that is also an end."""
        self._fallback = 0

    def feed(self, text: str) -> int:
        """Reads up to the end of the stop string; returns where that is, or -1."""
        at = 0
        while at < len(text):
            if not self.matched:  # skip at C's speed to where it can begin
                at = text.find(self.stop[0], at)
                if at < 0:
                    return -1
            self._step(text[at])
            at += 1
            if self.matched == len(self.stop):
                return at
        return -1

    def _step(self, letter: str) -> None:
        while self.matched and self.stop[self.matched] != letter:
            self.matched = self._table[self.matched - 1]
        if self.stop[self.matched] == letter:
            self.matched += 1
            self._extend()

    def _extend(self) -> None:
        """Makes the table reach the length that has matched."""
        if len(self._table) >= self.matched:
            return
        letter = self.stop[self.matched - 1]
        while self._fallback and self.stop[self._fallback] != letter:
            self._fallback = self._table[self._fallback - 1]
        self._fallback += self.stop[self._fallback] == letter
        self._table.append(self._fallback)


class StopStrings:
    """Several stop strings; the one that is complete first counts, the longest of those that end
    together. So what is found doesn't depend on how the text was cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in dict.fromkeys(stops) if stop]
        self._begins = frozenset(automaton.stop[0] for automaton in self._automata)
        self.begun = 0
        """Characters at the text's end that may be the beginning of a stop string."""

    def feed(self, text: str) -> Match | None:
        """The first stop string that the text completes. Nothing may be fed after one."""
        if not self.begun and self._begins.isdisjoint(text):
            return None
        found = [
            Match(end=end, text=automaton.stop)
            for automaton in self._automata
            if (end := automaton.feed(text)) >= 0
        ]
        self.begun = max((automaton.matched for automaton in self._automata), default=0)
        return min(found, key=lambda match: (match.end, -len(match.text)), default=None)
