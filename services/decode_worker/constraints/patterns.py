"""What the strings of schemas may be, with a mask of plain tokens for each place in them."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from weakref import WeakValueDictionary

from services.decode_worker.constraints.automata import DEAD, START, Automaton, automaton
from services.decode_worker.constraints.marked_schema import Bounds
from services.decode_worker.constraints.plain_tokens import Masks, PlainTokens, TooLarge, Words
from services.decode_worker.constraints.regexes import NotRead, read

MOST_LEFT: Final = 32
"""Characters: where a string of any kind has more left, llguidance itself is quick."""
BUILD_S: Final = 0.5
"""Processor time for the automata of a grammar's patterns; what is left then, llguidance answers.
The masks of the last one come on top (``plain_tokens.MOST_WORK``)."""
MOST_BYTES: Final = 64 << 20
"""Of masks and automata that are in use."""
RECENT: Final = 16
"""Patterns that are remembered beyond that."""
_PRIVATE: Final = (0x100000, 0x10FFFF)
"""Characters that no pattern may tell from each other: marks are among them."""


class KnownPattern(Protocol):
    def step(self, state: int, character: int) -> int:
        """The state behind a character; ``DEAD`` if there is none. The first one is ``START``."""

    def mask(self, state: int) -> Words | None:
        """Plain tokens that may follow; None where llguidance has to be asked. It always is where
        there is no choice: it allows nothing then but how it would spell what has to follow."""


@dataclass(frozen=True, kw_only=True)
class _Length:
    """Any characters, so many at most: states count them."""

    most: int
    fitting: Sequence[Words]

    def step(self, state: int, character: int) -> int:
        return state + 1 if state - START < self.most else DEAD

    def mask(self, state: int) -> Words | None:
        left = self.most - (state - START)
        return self.fitting[left] if 0 < left < len(self.fitting) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pattern:
    automaton: Automaton
    choices: Sequence[bool]
    """Of each state: whether several bytes may follow."""
    masks: Masks

    @property
    def nbytes(self) -> int:
        return self.masks.rows.nbytes + self.automaton.nbytes

    def step(self, state: int, character: int) -> int:
        return self.automaton.step(state, character)

    def mask(self, state: int) -> Words | None:
        if not self.choices[state]:
            return None
        found: Words = self.masks.rows[self.masks.of_state[state]]
        return found


class PatternBook:
    """For one vocabulary. Patterns are shared by all grammars that have them."""

    def __init__(self, plain: PlainTokens) -> None:
        self._plain = plain
        self._fitting = [plain.fitting(left) for left in range(MOST_LEFT)]
        self._in_use: WeakValueDictionary[Bounds, _Pattern] = WeakValueDictionary()
        self._recent: deque[_Pattern] = deque(maxlen=RECENT)
        self._turn = threading.Lock()

    def known(self, strings: Sequence[Bounds]) -> list[KnownPattern | None]:
        """Of those of a grammar; None for one that can't be known."""
        with self._turn:
            until = time.thread_time() + BUILD_S
            return [self._found(bounds, until) for bounds in strings]

    def _found(self, bounds: Bounds, until: float) -> KnownPattern | None:
        if bounds.pattern is None:
            return None if bounds.most is None else self._length(bounds.most)
        found = self._in_use.get(bounds)
        if found is None and time.thread_time() < until:
            found = self._made(bounds, until)
        return found

    def _length(self, most: int) -> KnownPattern:
        return _Length(most=most, fitting=self._fitting)

    def _made(self, bounds: Bounds, until: float) -> _Pattern | None:
        assert bounds.pattern is not None
        try:
            states = automaton(read(bounds.pattern), bounds.least, bounds.most, until)
            if states.divides(*_PRIVATE):
                return None
            masks = self._plain.masks(states)
        except (NotRead, TooLarge, RecursionError):
            return None
        found = _Pattern(automaton=states, choices=states.choices(), masks=masks)
        used = sum(pattern.nbytes for pattern in self._in_use.values())
        if used + found.nbytes > MOST_BYTES:
            return None
        self._in_use[bounds] = found
        self._recent.append(found)
        return found
