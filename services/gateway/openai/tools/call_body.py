"""One call as a model writes it, read letter by letter: the common interface, and JSON objects."""

import json
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from services.gateway.openai.tools.json_text import BLANKS, ValueSpan

_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_KEYS: Final = _ARGUMENTS | {"name", "type", "id"}
_MAX_KEY: Final = 256
"""Letters of a key, or of a function's name."""


class CallBody(Protocol):
    """Reads one call. ``feed`` returns the letters of its arguments that are certain now; it isn't
    called again once the call is done or wrong."""

    name: str
    """Of the function; known once ``begun`` is set."""
    begun: bool
    """It is a call, whatever follows."""
    done: bool
    wrong: bool
    """What was fed is no call, or no longer one."""

    def feed(self, letter: str) -> str: ...


class ObjectCall:
    """``{"name": "f", "arguments": {...}}``, with ``parameters`` in the place of ``arguments`` as
    Llama has it. A call whose arguments come first is known at its end."""

    def __init__(self, allowed: Collection[str] | None = None) -> None:
        """``allowed``: names of functions. An object of no such name, or with other keys than
        calls have, is no call then."""
        self.name = ""
        self.begun = self.done = self.wrong = False
        self._allowed = allowed
        self._state: Callable[[str], str] = self._open
        self._key = ""
        self._text: list[str] = []
        """Letters of the present key or value."""
        self._span = ValueSpan()
        self._early = ""
        """Arguments that came before the name, or had to be complete."""
        self._streams = False
        """Whether letters of the present value are returned as they come."""
        self._told = False
        """Whether arguments were returned."""

    def feed(self, letter: str) -> str:
        return self._state(letter)

    def _open(self, letter: str) -> str:
        self._state = self._before_key
        return self._unless(letter == "{")

    def _before_key(self, letter: str) -> str:
        if letter == "}":
            return self._close()
        if letter == '"':
            self._begin(self._in_key)
            self._span.feed(letter)
            self._text.append(letter)
            return ""
        return self._unless(letter in BLANKS)

    def _in_key(self, letter: str) -> str:
        self._text.append(letter)
        if self._span.feed(letter) == "last":
            self._key = _string("".join(self._text))
            self._state = self._before_value
            return self._unless(self._allowed is None or self._key in _KEYS)
        return self._unless(len(self._text) < _MAX_KEY)

    def _before_value(self, letter: str) -> str:
        if letter == ":":
            self._begin(self._in_value)
            first = not self._told and not self._early
            self._streams = first and bool(self.name) and self._key in _ARGUMENTS
            return ""
        return self._unless(letter in BLANKS)

    def _in_value(self, letter: str) -> str:
        if not self._span.kind and letter in BLANKS:
            return ""
        step = self._span.feed(letter)
        if step == "wrong":
            return self._unless(False)
        if step == "beyond":
            return self._end_value() + self._after_value(letter)
        told = self._value_letter(letter)
        return told + (self._end_value() if step == "last" else "")

    def _value_letter(self, letter: str) -> str:
        """A letter of the value: arguments go straight on once the function is known."""
        if self._streams and self._span.kind == "{":
            self.begun = self._told = True
            return letter
        self._text.append(letter)
        return self._unless(self._key != "name" or len(self._text) < _MAX_KEY)

    def _end_value(self) -> str:
        self._state = self._after_value
        text = "".join(self._text)
        if self._key == "name":
            self.name = self.name or _string(text)
            allowed = self._allowed is None or self.name in self._allowed
            return self._unless(bool(self.name) and allowed)
        if self._key in _ARGUMENTS and not self._told:
            self._early = _arguments(text)
        return ""

    def _after_value(self, letter: str) -> str:
        if letter == "}":
            return self._close()
        if letter == ",":
            self._state = self._before_key
            return ""
        return self._unless(letter in BLANKS)

    def _close(self) -> str:
        self.done = bool(self.name)
        self.begun = self.begun or self.done
        self.wrong = not self.done
        return "" if self._told or self.wrong else self._early or "{}"

    def _begin(self, state: Callable[[str], str]) -> None:
        self._state, self._text, self._span = state, [], ValueSpan()

    def _unless(self, right: bool) -> str:
        self.wrong = self.wrong or not right
        return ""


def _string(text: str) -> str:
    """The string that a text of JSON is; empty if it is none."""
    value = _parsed(text)
    return value if isinstance(value, str) else ""


def _arguments(text: str) -> str:
    """Arguments that are a whole text: an object, or a string that holds one."""
    value = _parsed(text)
    if value is None:
        return "{}"
    return value if isinstance(value, str) else text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
