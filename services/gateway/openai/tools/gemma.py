"""Gemma: ``<start_function_call>call:name{key:<escape>text<escape>,n:1}<end_function_call>``, and
the same with other marks. Arguments are no JSON, so they are told when the call is complete."""

import json
import re
from typing import Any, Final

from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.json_text import BLANKS
from services.gateway.openai.tools.reader import Syntax

_QUOTES: Final = ("<escape>", '<|"|>')
_CALL: Final = "call:"
_HEAD: Final = re.compile(r"\s*call:\s*([\w.:-]{1,256})\s*\{")
_PLAIN: Final = re.compile(r"[^,{}\[\]]*")
_KEY: Final = re.compile(r"\s*([^:{}\[\],]{1,256}?)\s*:\s*")
_MAX_DEPTH: Final = 64


class GemmaCall:
    """One call. It is complete with the bracket that closes its arguments."""

    def __init__(self) -> None:
        self.name = ""
        self.begun = self.done = self.wrong = False
        self._text = ""
        self._depth = 0
        self._quote = ""
        """What ends the string that is being read."""
        self._from = 0
        """Where the string begins."""

    def feed(self, letter: str) -> str:
        self._text += letter
        if self._depth or letter in "{}":
            return self._in_arguments(letter)
        begun = self._text.lstrip()
        self.wrong = not (begun.startswith(_CALL) or _CALL.startswith(begun))
        self.wrong = self.wrong or len(begun) > 300 or letter in BLANKS
        return ""

    def _in_arguments(self, letter: str) -> str:
        if self._quote:
            ended = self._text.endswith(self._quote) and len(self._text) >= self._from
            self._quote = "" if ended else self._quote
            return ""
        self._quote = next((quote for quote in _QUOTES if self._text.endswith(quote)), "")
        self._from = len(self._text) + len(self._quote)
        self._depth += (letter in "{[") - (letter in "}]")
        return "" if self._depth > 0 else self._close()

    def _close(self) -> str:
        head = _HEAD.match(self._text)
        if head is None:
            self.wrong = True
            return ""
        try:
            arguments, _ = _object(self._text, head.end(), 0)
        except ValueError:
            self.wrong = True
            return ""
        self.name, self.begun, self.done = head[1], True, True
        return json.dumps(arguments, ensure_ascii=False)


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    """The object behind an opening bracket, and where it ends. Raises ``ValueError``."""
    found: dict[str, Any] = {}
    while not (closed := _closed(text, at, "}")):
        key = _KEY.match(text, at)
        if key is None:
            raise ValueError("a key is missing")
        found[_without_quotes(key[1])], at = _value(text, key.end(), depth + 1)
        at = _past_comma(text, at)
    return found, closed


def _array(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found = []
    while not (closed := _closed(text, at, "]")):
        value, at = _value(text, at, depth + 1)
        found.append(value)
        at = _past_comma(text, at)
    return found, closed


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    at += len(text[at:]) - len(text[at:].lstrip())
    for quote in _QUOTES:
        if text.startswith(quote, at):
            end = text.index(quote, at + len(quote))
            return text[at + len(quote) : end], end + len(quote)
    if text[at] == "{":
        return _object(text, at + 1, depth)
    if text[at] == "[":
        return _array(text, at + 1, depth)
    plain = _PLAIN.match(text, at)
    assert plain is not None, "it may be empty"
    return _scalar(plain[0].strip()), plain.end()


def _scalar(text: str) -> Any:
    """Numbers, booleans and null; anything else is a text without quotes."""
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except ValueError:
        return text


def _without_quotes(key: str) -> str:
    for quote in (*_QUOTES, '"'):
        key = key.removeprefix(quote).removesuffix(quote)
    return key


def _closed(text: str, at: int, bracket: str) -> int:
    """The place behind the bracket if it comes next, else 0."""
    rest = text[at:].lstrip()
    return len(text) - len(rest) + 1 if rest.startswith(bracket) else 0


def _past_comma(text: str, at: int) -> int:
    rest = text[at:].lstrip()
    if rest.startswith(","):
        return len(text) - len(rest) + 1
    if rest.startswith(("}", "]")):
        return at
    raise ValueError("a comma is missing")


FORMAT: Final = ToolFormat(
    name="gemma",
    syntax=Syntax(
        begins=("<start_function_call>", "<|tool_call>"),
        ends=("<end_function_call>", "<tool_call|>"),
        body=GemmaCall,
    ),
    seen_in=("<start_function_call>", "<|tool_call>"),
    can_be_strict=False,
)
