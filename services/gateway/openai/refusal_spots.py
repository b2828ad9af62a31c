"""Where in a schema what a worker refuses may be, by what its refusal quotes."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from precast.json_schema import places_where

_Test = Callable[[dict[str, Any], str], bool]


def _has_type(schema: dict[str, Any], quoted: str) -> bool:
    kind = schema.get("type")
    return quoted in kind if isinstance(kind, list) else kind == quoted


def _requires(schema: dict[str, Any], quoted: str) -> bool:
    required = schema.get("required")
    return isinstance(required, list) and quoted in required


def _has_pattern(schema: dict[str, Any], sign: str) -> bool:
    pattern = schema.get("pattern")
    return isinstance(pattern, str) and sign in pattern


_CLUES: Final[tuple[tuple[re.Pattern[str], _Test], ...]] = (
    (re.compile(r"Invalid type: (\S+)$"), _has_type),
    (re.compile(r"Unknown format: (\S+)$"), lambda schema, name: schema.get("format") == name),
    (
        re.compile(r"Pointer '(.*)' does not exist"),
        lambda schema, pointer: schema.get("$ref") == f"#{pointer}",
    ),
    (re.compile(r"required property '(.*)' is unsatisfiable"), _requires),
    (re.compile(r"()look-around"), lambda schema, _: _has_pattern(schema, "(?")),
    (re.compile(r"()(?:unclosed|unopened|repetition|escape sequence|class)"), _has_pattern),
)
"""What refusals say, and of which schemas."""


def spots_of(reason: str, schema: Any) -> Iterator[str]:
    """Paths within the schema; none where the reason does not tell."""
    for clue, test in _CLUES:
        if found := clue.search(reason):
            return places_where(_quoting(test, found[1]), schema)
    return iter(())


def _quoting(test: _Test, quoted: str) -> Callable[[dict[str, Any]], bool]:
    return lambda schema: test(schema, quoted)
