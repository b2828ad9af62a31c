"""A schema of which one can ask which strings may begin: each part that says what a string has to
be takes another one as well, its mark, a character that nobody writes.

Where a string begins, the marks that are allowed tell which parts of the schema it may belong to. A
mark that no part has tells whether anything is allowed there.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

FIRST_MARK: Final = 0x10F800
MARKS: Final = 32
"""Characters, one after the other."""
MOST_DEPTH: Final = 60
_FREE: Final = 0
_UNKNOWN: Final = 1
"""Numbers of marks: the one that no part has, and the one of strings of which there is more to say
than a pattern and a length."""
_NOTES: Final = frozenset(
    {
        *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly"),
        *("writeOnly", "$schema", "$id", "$defs", "definitions"),
    }
)
"""Keywords that ask nothing of a value."""
_KEPT_OUTSIDE: Final[tuple[str, ...]] = ("$schema", "$id", "$defs", "definitions")
_BEYOND: Final = frozenset(
    {
        *("allOf", "not", "if", "then", "else", "propertyNames", "contains", "dependentSchemas"),
        *("dependencies", "additionalItems", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor", "x-guidance"),
    }
)
"""Keywords by which a part of a schema may be joined with another part."""
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions")
_NESTED: Final = ("items", "additionalProperties")
_LISTED: Final = ("prefixItems", "anyOf", "oneOf")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a string has to be."""

    pattern: str | None
    least: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class MarkedSchema:
    text: str
    strings: tuple[Bounds, ...]
    """Each has a mark, as ``mark_of`` gives it."""
    has_unknown: bool
    """Whether there are strings of which more is said."""


class _Beyond(Exception):
    """A schema that is not understood."""


def mark(number: int) -> str:
    return chr(FIRST_MARK + number)


def mark_of(index: int) -> str:
    """Of ``strings[index]``."""
    return mark(index + _UNKNOWN + 1)


FREE: Final = mark(_FREE)
UNKNOWN: Final = mark(_UNKNOWN)
_NO_MARK: Final = f"[^{mark(0)}-{mark(MARKS - 1)}]"


def marked(schema: str) -> MarkedSchema | None:
    """None for one without patterns and lengths, and for one that may join its parts."""
    if '"pattern"' not in schema and '"maxLength"' not in schema:
        return None
    marks = _Marks()
    try:
        parsed = json.loads(schema)
        if _has_marks(parsed):
            return None
        text = json.dumps(marks.part(parsed, 0))
    except (_Beyond, RecursionError):
        return None
    return MarkedSchema(text=text, strings=tuple(marks.strings), has_unknown=marks.unknown)


def _has_marks(schema: Any) -> bool:
    """However they are written in its text."""
    text = json.dumps(schema, ensure_ascii=False)
    return any(mark(number) in text for number in range(MARKS))


class _Marks:
    def __init__(self) -> None:
        self.strings: dict[Bounds, str] = {}
        self.unknown = False

    def part(self, schema: Any, depth: int) -> Any:
        """A schema, with marks."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _Beyond
        if _BEYOND & schema.keys() or depth > MOST_DEPTH:
            raise _Beyond
        _check_joined(schema)
        found = self._inner(schema, depth + 1)
        sign = self._mark(schema)
        self.unknown |= sign == UNKNOWN
        return found if sign is None else _with_mark(found, sign)

    def _inner(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        found = dict(schema)
        for key in _NAMED:
            if isinstance(named := schema.get(key), dict):
                found[key] = {name: self.part(each, depth) for name, each in named.items()}
        for key in _NESTED:
            if key in schema:
                found[key] = self.part(schema[key], depth)
        for key in _LISTED:
            if isinstance(listed := schema.get(key), list):
                found[key] = [self.part(each, depth) for each in listed]
        return found

    def _mark(self, schema: dict[str, Any]) -> str | None:
        """None where a string may be anything, or nothing."""
        if "enum" in schema or "const" in schema:
            return UNKNOWN if _has_strings(schema) else None
        kinds = schema.get("type", "string")
        if "string" not in (kinds if isinstance(kinds, list) else [kinds]):
            return None
        if "format" in schema:
            return UNKNOWN
        if "pattern" not in schema and "maxLength" not in schema:
            return None  # one that is only long enough: llguidance is quick
        return self._known(_bounds(schema))

    def _known(self, bounds: Bounds) -> str:
        if bounds not in self.strings and len(self.strings) == MARKS - 2:
            raise _Beyond
        return self.strings.setdefault(bounds, mark_of(len(self.strings)))


def _check_joined(schema: dict[str, Any]) -> None:
    """Raises _Beyond if two keywords say what a string is."""
    asked = schema.keys() - _NOTES
    for key in ("$ref", "anyOf", "oneOf"):
        if key in asked and asked != {key}:
            raise _Beyond
    for key in ("enum", "const"):
        if key in asked and asked - {key, "type"}:
            raise _Beyond


def _has_strings(schema: dict[str, Any]) -> bool:
    """Whether a value of an enumeration is a string. Raises _Beyond if one has strings in it."""
    values = schema.get("enum", [])
    if not isinstance(values, list):
        raise _Beyond
    values = values + ([schema["const"]] if "const" in schema else [])
    if any(isinstance(value, dict | list) and '"' in json.dumps(value) for value in values):
        raise _Beyond
    return any(isinstance(value, str) for value in values)


def _bounds(schema: dict[str, Any]) -> Bounds:
    pattern, least, most = (schema.get(key) for key in ("pattern", "minLength", "maxLength"))
    if not (isinstance(pattern, str | None) and isinstance(least, int | None)):
        raise _Beyond
    if not isinstance(most, int | None):
        raise _Beyond
    return Bounds(pattern=pattern, least=least or 0, most=most)


def _with_mark(schema: dict[str, Any], sign: str) -> dict[str, Any]:
    """References go through the whole schema, so that what they lead to stays outside."""
    outside = {key: schema[key] for key in _KEPT_OUTSIDE if key in schema}
    inside = {key: value for key, value in schema.items() if key not in _KEPT_OUTSIDE}
    if sign != UNKNOWN:
        inside = _without_marks(inside)
    return {**outside, "anyOf": [inside, {"const": sign}]}


def _without_marks(schema: dict[str, Any]) -> dict[str, Any]:
    """What takes strings takes none with marks in it."""
    if "pattern" in schema:
        return {**schema, "allOf": [{"pattern": f"^{_NO_MARK}*$"}]}
    bounds = _bounds(schema)
    left = {key: value for key, value in schema.items() if key not in ("minLength", "maxLength")}
    return {**left, "pattern": f"^{_NO_MARK}{{{bounds.least},{bounds.most}}}$"}
