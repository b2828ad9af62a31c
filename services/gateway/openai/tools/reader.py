"""Reads calls out of the text that a model writes.

A model's calls stand in regions: behind a mark such as ``<tool_call>``, or, where the format is
``bare``, at the beginning of the answer. Everything is decided letter by letter, so that the parts,
joined, don't depend on how the text was cut. What turns out not to be a call is content as it is.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part
from services.gateway.openai.tools.call_body import CallBody, ObjectCall
from services.gateway.openai.tools.json_text import BLANKS

_BETWEEN: Final = BLANKS | frozenset(",;[]")
"""What may stand around the calls of a region."""
_MANY: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """Where calls are, and how one is written."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    """End a region. It also ends where no further call follows."""
    bare: bool = False
    """An answer that begins with a call of a known function needs no mark."""
    bare_body: Callable[[Collection[str]], CallBody] = ObjectCall
    """Reads such a call, of one of the functions' names."""
    body: Callable[..., CallBody] = ObjectCall
    """Reads one call behind a mark."""

    @property
    def bare_by_name(self) -> bool:
        """Whether a call without a mark begins with its function's name, not with an object."""
        return self.bare_body is not ObjectCall


class CallReader:
    """Reads one answer."""

    def __init__(self, syntax: Syntax, *, names: Collection[str], most: int = _MANY) -> None:
        """``names``: of the functions there are. Calls after the first ``most`` are left out."""
        self._syntax = syntax
        self._names = names
        self._most = most
        self._first_letters = {name[0] for name in names} if syntax.bare_by_name else {"{", "["}
        """Of answers that are calls."""
        self._state = self._at_start if syntax.bare else self._outside
        self._waiting = ""
        """Text outside of regions that may be the beginning of a mark, or blanks before one."""
        self._trims = False
        """Whether blanks come after a call, where they are no content."""
        self._raw: list[str] = []
        """The letters of the region up to its present call."""
        self._call: list[str] = []
        """The letters of the present call."""
        self._mark = ""
        """The beginning of a mark within a region."""
        self._body: CallBody | None = None
        self._bare = False
        """Whether the region has no mark."""
        self._calls_before = 0
        self._begun = False
        """Whether the call that is being read was told."""
        self.calls = 0
        """Begun so far, those that are left out included."""
        self._parts: list[Part] = []

    def feed(self, text: str) -> list[Part]:
        rest = text
        while rest:
            rest = self._state(rest)
        return self._taken()

    def end(self) -> list[Part]:
        """What is left when the text is over."""
        if self._state in (self._at_start, self._outside) and not self._trims:
            self._content(self._waiting)
        elif self._state == self._within and self.calls == self._calls_before:
            self._content("".join([*self._raw, *self._call, self._mark]))
        return self._taken()

    def _taken(self) -> list[Part]:
        """Parts that follow from one text, the letters of a call's arguments joined."""
        parts, self._parts = self._parts, []
        taken: list[Part] = []
        for (kind, index), group in groupby(parts, key=_same_arguments):
            if kind is CallArguments:
                text = "".join(part.text for part in group if isinstance(part, CallArguments))
                taken.append(CallArguments(index=index, text=text))
            else:
                taken += group
        return taken

    def _content(self, text: str) -> None:
        if text:
            self._parts.append(Content(text=text))

    def _at_start(self, text: str) -> str:
        """Blanks, then the letter that decides."""
        waiting = self._waiting + text
        found = waiting.lstrip()
        if not found:
            self._waiting = waiting
            return ""
        if found[0] not in self._first_letters:
            self._state, self._waiting = self._outside, ""
            return waiting
        self._waiting = waiting[: len(waiting) - len(found)]
        self._enter(self._waiting, bare=True)
        return found

    def _outside(self, text: str) -> str:
        """Content up to the next mark."""
        waiting = self._waiting + text
        if self._trims:
            waiting = waiting.lstrip()
            self._trims = not waiting
        at, mark = _first(waiting, self._syntax.begins)
        if at >= 0:
            said = waiting[:at].rstrip()
            self._content(said)
            self._enter(waiting[len(said) : at + len(mark)], bare=False)
            return waiting[at + len(mark) :]
        kept = _kept_back(waiting, self._syntax.begins)
        self._content(waiting[: len(waiting) - kept])
        self._waiting = waiting[len(waiting) - kept :]
        return ""

    def _enter(self, raw: str, *, bare: bool) -> None:
        self._state, self._waiting, self._bare = self._within, "", bare
        self._raw, self._call, self._mark, self._body = [raw], [], "", None
        self._calls_before = self.calls

    def _within(self, text: str) -> str:
        """Letters of a region; what follows where it ends."""
        for at, letter in enumerate(text):
            if self._body is None:
                rest = self._between(letter)
            else:
                rest = self._in_call(self._body, letter)
            if self._state != self._within:
                return rest + text[at + 1 :]
        return ""

    def _between(self, letter: str) -> str:
        """A letter outside of the region's calls. Returns what doesn't belong to the region."""
        self._mark += letter
        if self._mark in self._syntax.ends:
            self._leave()
        elif self._mark in self._syntax.begins:
            self._raw.append(self._mark)
            self._mark = ""
        elif not any(mark.startswith(self._mark) for mark in self._marks()):
            letters, self._mark = self._mark, ""
            return self._plain(letters)
        return ""

    def _marks(self) -> tuple[str, ...]:
        return () if self._bare else (*self._syntax.begins, *self._syntax.ends)

    def _plain(self, letters: str) -> str:
        """Letters that are no mark: what stands between calls, or the next call's."""
        for at, letter in enumerate(letters):
            if self._body is None and letter in _BETWEEN:
                self._raw.append(letter)
                continue
            if self._body is None:
                self._body = (
                    self._syntax.bare_body(self._names) if self._bare else self._syntax.body()
                )
                self._begun, self._call = False, []
            rest = self._in_call(self._body, letter)
            if self._state != self._within:
                return rest + letters[at + 1 :]
        return ""

    def _in_call(self, body: CallBody, letter: str) -> str:
        """A letter of a call. Returns what doesn't belong to the region."""
        self._call.append(letter)
        told = body.feed(letter)
        if body.begun:
            self._tell(body, told)
        if body.done:
            self._raw += self._call
            self._body, self._call = None, []
        elif body.wrong:
            return self._give_up(letter)
        return ""

    def _tell(self, body: CallBody, arguments: str) -> None:
        if not self._begun:
            self._begun = True
            self.calls += 1
            if self.calls <= self._most:
                self._parts.append(CallBegun(index=self.calls - 1, name=body.name))
        if arguments and self.calls <= self._most:
            self._parts.append(CallArguments(index=self.calls - 1, text=arguments))

    def _give_up(self, letter: str) -> str:
        """The region goes on with something else: content, unless it is the rest of a call."""
        call, begun = "".join(self._call), self._begun
        known = self.calls > self._calls_before
        if not known:
            self._content("".join(self._raw) + call)
        self._leave()
        if begun and self._syntax.ends and not self._bare:
            self._state = self._behind
        return (letter if begun else call) if known else ""

    def _behind(self, text: str) -> str:
        """Up to the end of a region whose last call is broken."""
        waiting = self._waiting + text
        at, end = _first(waiting, self._syntax.ends)
        if at >= 0:
            self._state, self._waiting = self._outside, ""
            return waiting[at + len(end) :]
        self._waiting = waiting[-max(map(len, self._syntax.ends)) :]
        return ""

    def _leave(self) -> None:
        self._state, self._body = self._outside, None
        self._raw, self._call, self._mark = [], [], ""
        self._trims = self._trims or self.calls > self._calls_before


def _same_arguments(part: Part) -> tuple[type, int]:
    return type(part), part.index if isinstance(part, CallArguments) else 0


def _first(text: str, marks: Collection[str]) -> tuple[int, str]:
    """The place of the first mark, and which it is; -1 if there is none."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=(-1, ""))


def _kept_back(text: str, marks: Collection[str]) -> int:
    """Letters at the end that may be blanks before a mark, and the beginning of it."""
    lengths = (n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
    begun = max(lengths, default=0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())
