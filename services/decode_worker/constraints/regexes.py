"""Regular expressions of JSON schemas, read so far that an automaton can be made of them.

What the library may read in another way is not read at all: look-around, flags, classes of classes,
anchors in the middle.
"""

from dataclasses import dataclass
from typing import Final

from services.decode_worker.constraints.characters import (
    ALL,
    DIGITS,
    SPACES,
    WORDS,
    Characters,
    one,
    others,
    union,
)

MOST_TIMES: Final = 512
"""That a part may be repeated."""
MOST_SIGNS: Final = 2048
_HEXADECIMAL: Final = frozenset("0123456789abcdefABCDEF")
_CLASSES: Final[dict[str, Characters]] = {
    "d": DIGITS,
    "w": WORDS,
    "s": SPACES,
    "D": others(DIGITS),
    "W": others(WORDS),
    "S": others(SPACES),
}
_CONTROLS: Final = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_CODES: Final = {"x": 2, "u": 4}
"""Escapes of a character's number, and their hexadecimal digits."""


class NotRead(Exception):
    """An expression with something in it that is not read here."""


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """A character."""

    characters: Characters


@dataclass(frozen=True, kw_only=True)
class Joined:
    parts: "tuple[Expression, ...]"


@dataclass(frozen=True, kw_only=True)
class Either:
    cases: "tuple[Expression, ...]"


@dataclass(frozen=True, kw_only=True)
class Repeated:
    part: "Expression"
    least: int
    most: int | None


Expression = OneOf | Joined | Either | Repeated
ANYTHING: Final = Repeated(part=OneOf(characters=ALL), least=0, most=None)


def read(pattern: str) -> Expression:
    """What a text has to be, as a whole, for a pattern to be found in it. Raises NotRead."""
    if len(pattern) > MOST_SIGNS:
        raise NotRead(f"{len(pattern)} signs")
    try:
        return _read(pattern)
    except RecursionError:
        raise NotRead("nested too deeply") from None


def _read(pattern: str) -> Expression:
    at_start = pattern.startswith("^")
    at_end = pattern.endswith("$") and _is_bare(pattern, len(pattern) - 1)
    reader = _Reader(pattern[at_start : len(pattern) - at_end])
    found = reader.either()
    if reader.rest:
        raise NotRead(f"{reader.rest[0]} in {pattern}")
    if isinstance(found, Either) and (at_start or at_end):
        raise NotRead("an anchor of one case only")
    before = () if at_start else (ANYTHING,)
    behind = () if at_end else (ANYTHING,)
    return Joined(parts=(*before, found, *behind))


def _is_bare(pattern: str, at: int) -> bool:
    """Whether no backslash stands for the character."""
    before = pattern[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 0


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    def either(self) -> Expression:
        cases = [self._joined()]
        while self._takes("|"):
            cases.append(self._joined())
        return cases[0] if len(cases) == 1 else Either(cases=tuple(cases))

    def _joined(self) -> Expression:
        parts = list[Expression]()
        while self.rest and self.rest[0] not in "|)":
            parts.append(self._repeated(self._part()))
        return Joined(parts=tuple(parts))

    def _repeated(self, part: Expression) -> Expression:
        bounds = self._bounds()
        if bounds is None:
            return part
        self._takes("?")  # as few as possible: the language is the same
        if self.rest and self.rest[0] in "*+?{":
            raise NotRead("repeated twice")
        return Repeated(part=part, least=bounds[0], most=bounds[1])

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return bounds
        return self._counts() if self._takes("{") else None

    def _counts(self) -> tuple[int, int | None]:
        text = self._until("}")
        least, comma, most = text.partition(",")
        if not least.isdecimal() or (most and not most.isdecimal()):
            raise NotRead(f"{{{text}}}")
        low = int(least)
        high = int(most) if most else None if comma else low
        if max(low, high or 0) > MOST_TIMES or (high is not None and high < low):
            raise NotRead(f"{{{text}}}")
        return low, high

    def _part(self) -> Expression:
        if self._takes("("):
            return self._group()
        if self._takes("["):
            return OneOf(characters=self._class())
        if self._takes("."):
            return OneOf(characters=others(one("\n")))
        if self._takes("\\"):
            return OneOf(characters=self._escaped())
        sign = self._next()
        if sign in "*+?{}]^$":
            raise NotRead(f"a bare {sign}")
        return OneOf(characters=one(sign))

    def _group(self) -> Expression:
        if self._takes("?") and not self._takes(":"):
            self._takes("P")
            if not self._takes("<") or not self._until(">").isidentifier():
                raise NotRead("a group of another kind")
        found = self.either()
        if not self._takes(")"):
            raise NotRead("an open group")
        return found

    def _class(self) -> Characters:
        inverted = self._takes("^")
        found: Characters = ()
        first = True
        while first or not self._takes("]"):
            first = False
            found = union(found, self._member())
        return others(found) if inverted else found

    def _member(self) -> Characters:
        """A character of a class, a range, or a class by its letter."""
        low = self._single()
        if not self.rest.startswith("-") or self.rest.startswith("-]"):
            return low
        self._takes("-")
        high = self._single()
        if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
            raise NotRead("a range of classes")
        if low[0][0] > high[0][0]:
            raise NotRead("a range from above")
        return ((low[0][0], high[0][0]),)

    def _single(self) -> Characters:
        if self._takes("\\"):
            return self._escaped()
        sign = self._next()
        if sign in "[]" or (sign in "&-~|" and self.rest.startswith(sign)):
            raise NotRead(f"{sign} in a class")
        if sign == "-" and not self.rest.startswith("]"):
            raise NotRead("- in the middle of a class")
        return one(sign)

    def _escaped(self) -> Characters:
        sign = self._next()
        if sign in _CLASSES:
            return _CLASSES[sign]
        if sign in _CONTROLS:
            return one(_CONTROLS[sign])
        if sign in _CODES:
            return self._numbered(_CODES[sign])
        if sign.isalnum() or not sign.isascii():
            raise NotRead(f"\\{sign}")
        return one(sign)

    def _numbered(self, digits: int) -> Characters:
        number = "".join(self._next() for _ in range(digits))
        if not _HEXADECIMAL.issuperset(number) or 0xD800 <= int(number, 16) < 0xE000:
            raise NotRead(f"a character's number {number}")
        return one(chr(int(number, 16)))

    def _until(self, sign: str) -> str:
        text, found, _ = self.rest.partition(sign)
        if not found:
            raise NotRead(f"no {sign}")
        self._at += len(text) + 1
        return text

    def _takes(self, sign: str) -> bool:
        found = self.rest.startswith(sign)
        self._at += found
        return found

    def _next(self) -> str:
        if not self.rest:
            raise NotRead("it ends too early")
        self._at += 1
        return self._text[self._at - 1]
