"""Masks of patterns within bounds: what is beyond them is left to llguidance."""

import pytest

from services.decode_worker.constraints import patterns, plain_tokens
from services.decode_worker.constraints.automata import automaton
from services.decode_worker.constraints.marked_schema import Bounds
from services.decode_worker.constraints.patterns import PatternBook
from services.decode_worker.constraints.plain_tokens import PlainTokens, TooLarge
from services.decode_worker.constraints.regexes import read

PLAIN = PlainTokens([bytes([97 + one, 97 + two]) for one in range(26) for two in range(26)])
NAME = Bounds(pattern="^[a-z]{3}$", least=0, most=None)


def test_a_level_with_too_many_places_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    states = automaton(read("^[a-z]{3}$"))
    gone_through, level = [], plain_tokens._next

    def next_(*given: object) -> object:
        gone_through.append(given)
        return level(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(plain_tokens, "_next", next_)
    monkeypatch.setattr(plain_tokens, "MOST_WORK", 26 * len(states.targets))
    with pytest.raises(TooLarge):
        PLAIN.masks(states)
    assert len(gone_through) == 1  # of first characters; there are 676 second ones


def test_levels_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    states = automaton(read("^([a-m][b-x]|z*|q[a-c]{2})+$"))
    whole = PLAIN.masks(states)
    monkeypatch.setattr(plain_tokens, "_AT_ONCE", 7 * len(states.targets))
    parts = PLAIN.masks(states)
    assert parts.of_state == whole.of_state
    assert parts.rows.tolist() == whole.rows.tolist()
    assert len(whole.rows) > 2


def test_automata_are_among_the_bytes_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states = automaton(read("^[a-z]{3}$"))
    masks = PLAIN.masks(states).rows.nbytes
    monkeypatch.setattr(patterns, "MOST_BYTES", masks + states.nbytes - 1)
    assert PatternBook(PLAIN).known([NAME]) == [None]
    monkeypatch.setattr(patterns, "MOST_BYTES", masks + states.nbytes)
    assert PatternBook(PLAIN).known([NAME]) != [None]
    assert states.nbytes > states.targets.nbytes >= 2 * states.targets.size


@pytest.mark.parametrize(("seconds", "is_known"), [(0.02, False), (60.0, True)])
def test_automata_end_with_the_time_of_their_grammar(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_known: bool
) -> None:
    """One that is begun in time, too."""
    signs = "|".join(chr(0x4E00 + number) for number in range(480))
    slow = Bounds(pattern=f"^.{{300}}(?:{signs})$", least=0, most=None)
    monkeypatch.setattr(patterns, "BUILD_S", seconds)
    assert (PatternBook(PLAIN).known([slow]) != [None]) == is_known
