"""Where a JSON text stands that is written byte by byte."""

from collections.abc import Iterator
from typing import Final

QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")
_OPENING: Final = frozenset(b"{[")
_CLOSING: Final = frozenset(b"}]")


class JsonText:
    """Of valid JSON only: nothing is checked."""

    def __init__(self) -> None:
        self._within = bytearray()
        """Brackets that are open."""
        self._names = False
        """Whether a string that begins here is a name."""
        self.content: bytearray | None = None
        """Of the value in which it stands, if that is a string; of names nothing."""
        self._in_name = False
        self._escaped = False
        self.has_escapes = False
        """The string."""

    def copy(self) -> "JsonText":
        other = JsonText()
        vars(other).update(vars(self))
        other._within = self._within.copy()
        other.content = None if self.content is None else self.content.copy()
        return other

    def opening(self, text: bytes) -> Iterator[tuple[bytes, bool]]:
        """Goes through more of the text; gives it in pieces that end where strings begin that are
        values, and with each whether one does."""
        begun = 0
        for at, byte in enumerate(text):
            if self.content is not None or self._in_name:
                self._on_in_string(byte)
            elif self._on(byte):
                yield text[begun : at + 1], True
                begun = at + 1
        yield text[begun:], False

    def _on(self, byte: int) -> bool:
        """Outside of strings; whether a value begins that is one."""
        if byte == QUOTE:
            self._in_name = self._names
            self._escaped = self.has_escapes = False
            self.content = None if self._names else bytearray()
            return not self._names
        if byte in _OPENING:
            self._within.append(byte)
        elif byte in _CLOSING and self._within:
            self._within.pop()
        if byte in b"{[,:":
            self._names = byte != ord(":") and self._within[-1:] == b"{"
        return False

    def _on_in_string(self, byte: int) -> None:
        if byte == QUOTE and not self._escaped:
            self._in_name, self.content = False, None
            return
        self._escaped = byte == _BACKSLASH and not self._escaped
        self.has_escapes |= byte == _BACKSLASH
        if self.content is not None:
            self.content.append(byte)
