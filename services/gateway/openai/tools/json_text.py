"""Finds where a value of JSON ends, letter by letter."""

from typing import Final, Literal

Step = Literal["more", "last", "beyond", "wrong"]
"""The value goes on; ends with this letter; ended before it; or can't begin with it."""
BLANKS: Final = frozenset(" \t\r\n")
_ENDS: Final = frozenset(",}] \t\r\n")


class StringSpan:
    """Tells which letters are within a string, its quotes included."""

    def __init__(self) -> None:
        self.within = False
        self._escaped = False

    def feed(self, letter: str) -> bool:
        """Whether the letter belongs to a string."""
        if not self.within:
            self.within = letter == '"'
            return self.within
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            self.within = False
        return True


class ValueSpan:
    """One value. Brackets are counted, not matched by kind: what is in between is the model's."""

    def __init__(self) -> None:
        self.kind = ""
        """``{``, ``[``, ``"`` or ``s``, a scalar; empty before its first letter."""
        self._depth = 0
        self._string = StringSpan()

    def feed(self, letter: str) -> Step:
        if not self.kind:
            return self._begin(letter)
        if self.kind == "s":
            return "beyond" if letter in _ENDS else "more"
        if self._string.feed(letter):
            return "last" if self.kind == '"' and not self._string.within else "more"
        self._depth += (letter in "{[") - (letter in "}]")
        return "more" if self._depth else "last"

    def _begin(self, letter: str) -> Step:
        if letter in _ENDS or letter == ":":
            return "wrong"
        self.kind = letter if letter in '{["' else "s"
        self._string.feed(letter)
        self._depth = int(letter in "{[")
        return "more"
