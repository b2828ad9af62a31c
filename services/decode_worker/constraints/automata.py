"""Deterministic automata over characters, of regular expressions and bounds of length.

States are sets of what may come next: each character class of the expression, repeated parts
spelled out, is a position, and the positions that may follow one are known (Glushkov). A set of
positions is the bits of a number.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.decode_worker.constraints.characters import LAST, Characters, has
from services.decode_worker.constraints.regexes import (
    Either,
    Expression,
    Joined,
    NotRead,
    OneOf,
    Repeated,
)

MOST_POSITIONS: Final = 1024
MOST_STATES: Final = 320
MOST_RAW_STATES: Final = 1024
"""Before those are joined that behave alike."""
MOST_STEPS: Final = 200_000
"""Positions that are gone through, of all states together: 50 ms, besides what each class takes."""
DEAD: Final = 0
"""The state that no end can be reached from."""
START: Final = 1
Numbers = NDArray[np.int16]
State = tuple[int, bool, int]
"""Positions that may come next, whether the text may end, and its characters as far as they are
counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Automaton:
    starts: tuple[int, ...]
    """Of ranges of characters, by number; each reaches to the next one's start."""
    classes: tuple[int, ...]
    """For each range."""
    targets: Numbers
    """[states, classes]: the state behind a character of a class."""

    @property
    def nbytes(self) -> int:
        """About: what a range takes is a number in two tuples."""
        return self.targets.nbytes + 64 * len(self.starts)

    def step(self, state: int, character: int) -> int:
        return int(self.targets[state, self.classes[bisect_right(self.starts, character) - 1]])

    def choices(self) -> list[bool]:
        """Of each state: whether characters of several first bytes may follow."""
        lowest, highest = self._first_bytes()
        alive = self.targets != DEAD
        low = np.where(alive, lowest, 0xFF).min(axis=1)
        found: list[bool] = (low < np.where(alive, highest, 0).max(axis=1)).tolist()
        return found

    def _first_bytes(self) -> tuple[Numbers, Numbers]:
        """Of each class: of its first character, and of its last one."""
        lowest = np.full(self.targets.shape[1], 0xFF, dtype=np.int16)
        highest = np.zeros_like(lowest)
        ends = (*(start - 1 for start in self.starts[1:]), LAST)
        for at, low, high in zip(self.classes, self.starts, ends, strict=True):
            lowest[at] = min(lowest[at], _first_byte(low))
            highest[at] = max(highest[at], _first_byte(high))
        return lowest, highest

    def divides(self, low: int, high: int) -> bool:
        """Whether it tells characters of a range from each other."""
        return bisect_right(self.starts, low) != bisect_right(self.starts, high)


def _first_byte(character: int) -> int:
    return chr(min(character, LAST)).encode(errors="surrogatepass")[0]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Positions of a part of an expression."""

    nullable: bool
    first: int
    last: int


_EMPTY: Final = _Part(nullable=True, first=0, last=0)


def automaton(
    expression: Expression, least: int = 0, most: int | None = None, until: float = math.inf
) -> Automaton:
    """Of texts of so many characters that are what an expression says. Raises NotRead if there are
    none, it is too large, or this thread's processor time gets beyond ``until``."""
    positions = _Positions()
    whole = positions.of(expression)
    starts, classes, signs = _classes(positions.characters, until)
    states, targets = _states(positions, whole, signs, (least, most), until)
    alive = sorted(_alive(states, targets))
    if 0 not in alive:
        raise NotRead("nothing is allowed")
    number = {state: at + 1 for at, state in enumerate(alive)}
    kept = [[number.get(to, DEAD) for to in targets[state]] for state in alive]
    ends = [False, *(states[state][1] for state in alive)]
    table = np.array([[DEAD] * len(signs), *kept], dtype=np.int16)
    return Automaton(starts=starts, classes=classes, targets=_joined_alike(table, ends, until))


def _check_time(until: float) -> None:
    if time.thread_time() > until:
        raise NotRead("it takes too long")


class _Positions:
    def __init__(self) -> None:
        self.characters: list[Characters] = []
        self.follow: list[int] = []
        """Of each position: those that may come behind it."""

    def of(self, expression: Expression) -> _Part:
        match expression:
            case OneOf():
                return self._new(expression.characters)
            case Joined():
                return self._joined(map(self.of, expression.parts))
            case Either():
                return _either([self.of(case) for case in expression.cases])
            case Repeated():
                return self._joined(self._repeated(expression))

    def behind(self, taken: int) -> int:
        """Positions that may follow one of these."""
        return reduce(or_, (self.follow[at] for at in bits(taken)), 0)

    def _new(self, characters: Characters) -> _Part:
        if len(self.characters) == MOST_POSITIONS:
            raise NotRead(f"more than {MOST_POSITIONS} characters")
        self.characters.append(characters)
        self.follow.append(0)
        bit = 1 << (len(self.characters) - 1)
        return _Part(nullable=False, first=bit, last=bit)

    def _repeated(self, expression: Repeated) -> Iterator[_Part]:
        """Each time as a part of its own; the last one is repeated where there is no end."""
        if expression.most is None:
            times = max(0, expression.least - 1)
            yield from self._repeated(Repeated(part=expression.part, least=times, most=times))
            part = self.of(expression.part)
            self._link(part.last, part.first)
            yield part if expression.least else _optional(part)
            return
        for number in range(expression.most):
            part = self.of(expression.part)
            yield part if number < expression.least else _optional(part)
            if not part.first:
                return  # however often: it is nothing

    def _joined(self, parts: Iterator[_Part]) -> _Part:
        return reduce(self._pair, parts, _EMPTY)

    def _pair(self, one: _Part, two: _Part) -> _Part:
        self._link(one.last, two.first)
        return _Part(
            nullable=one.nullable and two.nullable,
            first=one.first | (two.first if one.nullable else 0),
            last=two.last | (one.last if two.nullable else 0),
        )

    def _link(self, last: int, first: int) -> None:
        for at in bits(last):
            self.follow[at] |= first


def _either(cases: Sequence[_Part]) -> _Part:
    return _Part(
        nullable=any(case.nullable for case in cases),
        first=reduce(or_, (case.first for case in cases)),
        last=reduce(or_, (case.last for case in cases)),
    )


def _optional(part: _Part) -> _Part:
    return _Part(nullable=True, first=part.first, last=part.last)


def bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _classes(
    positions: Sequence[Characters], until: float
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Ranges of characters that no position tells apart, the class of each, and for each class the
    positions that take it."""
    sets = {characters: number for number, characters in enumerate(dict.fromkeys(positions))}
    edges = {edge for each in sets for low, high in each for edge in (low, high + 1)}
    starts = tuple(sorted(edges | {0}))
    where = [0] * len(sets)
    for at, characters in enumerate(positions):
        where[sets[characters]] |= 1 << at
    taken = list[int]()
    for start in starts:
        _check_time(until)
        taken.append(reduce(or_, (where[sets[s]] for s in sets if has(s, start)), 0))
    known = {signs: number for number, signs in enumerate(dict.fromkeys(taken))}
    return starts, tuple(known[signs] for signs in taken), tuple(known)


def _states(
    positions: _Positions,
    whole: _Part,
    signs: Sequence[int],
    bounds: tuple[int, int | None],
    until: float,
) -> tuple[list[State], list[list[int]]]:
    """And for each the state behind each class; -1 where there is none."""
    least, most = bounds
    counted = least if most is None else most
    states: list[State] = [(whole.first, whole.nullable and least == 0, 0)]
    known, targets, steps = {states[0]: 0}, list[list[int]](), 0
    while len(targets) < len(states):
        _check_time(until)
        following, _, length = states[len(targets)]
        row = list[int]()
        for sign in signs:
            taken = following & sign
            if not taken or length == most:
                row.append(-1)
                continue
            steps += taken.bit_count()
            may_end = bool(taken & whole.last) and length + 1 >= least
            state = (positions.behind(taken), may_end, min(length + 1, counted))
            row.append(known.setdefault(state, len(states)))
            if row[-1] == len(states):
                states.append(state)
        targets.append(row)
        if len(states) > MOST_RAW_STATES or steps > MOST_STEPS:
            raise NotRead(f"more than {MOST_RAW_STATES} states")
    return states, targets


def _joined_alike(targets: Numbers, ends: Sequence[bool], until: float) -> Numbers:
    """[states, classes], of fewer states; those that differ in nothing are one. The first two stay
    the first two. A chain of states takes a round for each: rounds only add states, so that too
    many are known as soon as there are."""
    group = _numbered(np.array([[at == DEAD, end] for at, end in enumerate(ends)], dtype=np.int16))
    while True:
        _check_time(until)
        finer = _numbered(np.column_stack([group, group[targets]]))
        if finer.max() >= MOST_STATES:
            raise NotRead(f"more than {MOST_STATES} states")
        if finer.max() == group.max():
            break
        group = finer
    _, first = np.unique(group, return_index=True)
    found: Numbers = group[targets[first]]
    return found


def _numbered(rows: Numbers) -> Numbers:
    """The same number for rows that are the same, in the order in which they come."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(row.tobytes(), len(known)) for row in rows], dtype=np.int16)


def _alive(states: Sequence[State], targets: Sequence[Sequence[int]]) -> set[int]:
    """States that an end can be reached from."""
    alive = {at for at, (_, may_end, _) in enumerate(states) if may_end}
    before: list[set[int]] = [set() for _ in states]
    for at, row in enumerate(targets):
        for to in set(row) - {-1}:
            before[to].add(at)
    pending = list(alive)
    while pending:
        new = before[pending.pop()] - alive
        alive |= new
        pending += new
    return alive
