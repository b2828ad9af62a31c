"""Qwen3-Coder: ``<function=name><parameter=key>value</parameter></function>``, in ``<tool_call>``.

Values are bare texts, whose types the tools' schemas say, so arguments are told when the call is
complete. A grammar makes such a model write calls as Hermes does: both are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from services.gateway.openai.tools import hermes
from services.gateway.openai.tools.call_body import ObjectCall

_OPEN: Final = "<function="
_CLOSE: Final = "</function>"
_END: Final = "</tool_call>"
_HEAD: Final = re.compile(r"\s*<function=([^<>\s]{1,256})>")
_PARAMETER: Final = re.compile(
    r"\s*<parameter=([^<>\n]{1,256})>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>$))",
    re.DOTALL,
)
_WORDS: Final = {"True": True, "False": False, "None": None}
"""As templates show such values in earlier calls."""
_TYPES_OF: Final[dict[type, tuple[str, ...]]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
    list: ("array",),
    dict: ("object",),
    str: ("string",),
}
_TYPES: Final = frozenset(kind for kinds in _TYPES_OF.values() for kind in kinds)
_MAX_DEPTH: Final = 8
Schemas = Mapping[str, Mapping[str, Any]]
"""Of arguments, by the functions' names."""


class FunctionCall:
    """One call. It is complete with the mark that closes the function."""

    def __init__(self, schemas: Schemas | None = None) -> None:
        self.name = ""
        self.begun = self.done = self.wrong = False
        self._schemas = schemas or {}
        self._text = ""
        self._object: ObjectCall | None = None

    def feed(self, letter: str) -> str:
        if not self._text and letter == "{":
            self._object = ObjectCall()
        self._text += letter
        if self._object is not None:
            return self._delegate(self._object, letter)
        if len(self._text) <= len(_OPEN) + 1:
            begun = self._text.lstrip()
            self.wrong = not (begun.startswith(_OPEN) or _OPEN.startswith(begun))
        if letter == ">" and self._text.endswith(_END):
            self.wrong = self._text.rfind("<parameter=") <= self._text.rfind("</parameter>")
        return self._close() if letter == ">" and self._text.endswith(_CLOSE) else ""

    def _delegate(self, call: ObjectCall, letter: str) -> str:
        told = call.feed(letter)
        self.name, self.begun, self.done, self.wrong = call.name, call.begun, call.done, call.wrong
        return told

    def _close(self) -> str:
        """Unless the mark stands within a value."""
        head = _HEAD.match(self._text)
        if head is None:
            self.wrong = True
            return ""
        found, at = {}, head.end()
        while (parameter := _PARAMETER.match(self._text, at)) is not None:
            found[parameter[1]], at = parameter[2], parameter.end()
        if self._text[at:].strip() != _CLOSE:
            return ""
        self.name, self.begun, self.done = head[1], True, True
        schema = self._schemas.get(self.name, {})
        typed = {key: _typed(value, schema, key) for key, value in found.items()}
        return json.dumps(typed, ensure_ascii=False)


def _typed(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """The value that a text stands for: a text, unless the schema wants what it is besides."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, Mapping) else None
    kinds = _kinds(wanted, schema, 0)
    value = _value(text)
    if isinstance(value, str) or (kinds and not kinds & _kinds_of(value)):
        return text if "string" in kinds or isinstance(value, str) else value
    return value


def _value(text: str) -> Any:
    if text.strip() in _WORDS:
        return _WORDS[text.strip()]
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text


def _kinds(wanted: object, schema: Mapping[str, Any], depth: int) -> set[str]:
    """Types that a part of the schema allows; empty: any."""
    if not isinstance(wanted, Mapping) or depth > _MAX_DEPTH:
        return set()
    if isinstance(ref := wanted.get("$ref"), str):
        *_, group, name = ("", *ref.split("/"))
        found = schema.get(group)
        return _kinds(found.get(name) if isinstance(found, Mapping) else None, schema, depth + 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(cases := wanted.get(key), list):
            return set().union(*(_kinds(case, schema, depth + 1) for case in cases))
    values = wanted.get("enum", [wanted["const"]] if "const" in wanted else None)
    if isinstance(values, list):
        return set().union(*map(_kinds_of, values))
    kinds = wanted.get("type", [])
    return {kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind in _TYPES}


def _kinds_of(value: object) -> set[str]:
    return set(_TYPES_OF.get(type(value), ()))


FORMAT: Final = replace(
    hermes.FORMAT,
    name="qwen3_coder",
    syntax=replace(hermes.SYNTAX, body=FunctionCall),
    seen_in=("<function=",),
    typed=True,
)
