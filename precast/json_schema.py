"""JSON schemas as their writers' tools make them: with keywords that ask nothing.

``uniqueItems: false`` and ``propertyNames: {"type": "string"}`` hold for any value, ``format:
int32`` and ``password`` say nothing of a text. Who can't hold an answer to such a keyword need not
refuse it either, so these are left out before anybody looks.
"""

from collections.abc import Callable, Iterator, Set
from typing import Any, Final

_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords behind which there are values, and no schemas."""
_NAMED: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords behind which there are schemas by name."""
_ANYTHING: Final[tuple[Any, ...]] = (True, {})
_IDLE: Final[dict[str, tuple[Any, ...]]] = {
    "uniqueItems": (False,),
    "propertyNames": (*_ANYTHING, {"type": "string"}),
    "unevaluatedProperties": _ANYTHING,
    "unevaluatedItems": _ANYTHING,
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "not": (False,),
}
"""Keywords with the values of which they ask nothing."""
_LONE: Final = {"if": ("then", "else"), "minContains": ("contains",), "maxContains": ("contains",)}
"""Keywords that ask nothing without one of these beside them."""
_NUMBERS: Final = frozenset(
    {
        *("int", "int8", "int16", "int32", "int64", "float", "double"),
        *("uint", "uint8", "uint16", "uint32", "uint64"),
    }
)
"""Formats of numbers: they bind no text, except where nothing but a text is asked for."""
_HINTS: Final = frozenset({"password", "binary", "path", "file-path", "directory-path", "new-path"})
"""Formats of texts that may be any, as OpenAPI and pydantic write them."""


def without_idle(schema: Any) -> Any:
    """The schema, or list of schemas, without what asks nothing at any place of it."""
    if isinstance(schema, list):
        return [without_idle(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("not") in _ANYTHING:  # as zod writes never
        return False
    kept = {key: value for key, value in schema.items() if not _is_idle(key, value, schema)}
    return {key: _behind(key, value) for key, value in kept.items()}


def _is_idle(key: str, value: Any, schema: dict[str, Any]) -> bool:
    if key == "format" and isinstance(value, str):
        return value in _HINTS or (value in _NUMBERS and schema.get("type") != "string")
    if key in _LONE:
        return not any(other in schema for other in _LONE[key])
    return any(type(value) is type(idle) and value == idle for idle in _IDLE.get(key, ()))


def _behind(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: without_idle(schema) for name, schema in value.items()}
    return without_idle(value)


def place_of(keywords: Set[str], schema: Any) -> str | None:
    """Path of the first schema that has one of the keywords, whatever it asks; None: none has."""
    return next(places_where(lambda part: bool(keywords & part.keys()), schema), None)


def places_where(
    test: Callable[[dict[str, Any]], bool], schema: Any, path: str = ""
) -> Iterator[str]:
    """Paths of the schema, and of those within it, that pass."""
    if isinstance(schema, dict) and test(schema):
        yield path
    for step, part in _parts(schema):
        yield from places_where(test, part, f"{path}{step}")


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Schemas, or what holds some, right within a schema, and the steps to them."""
    if isinstance(schema, list):
        yield from ((f"[{at}]", each) for at, each in enumerate(schema))
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            yield from ((f".{key}.{name}", each) for name, each in value.items())
        elif key not in _VALUES:
            yield f".{key}", value
