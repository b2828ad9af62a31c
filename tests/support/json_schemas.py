"""JSON schemas as clients send them, each with answers that it allows and that it doesn't.

They follow what public collections have: tool arguments, records, configurations, and a case for
each keyword that the grammars are said to support.
"""

import random
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

Json = Any


@dataclass(frozen=True, kw_only=True)
class SchemaCase:
    name: str
    schema: Json
    valid: tuple[Json, ...]
    invalid: tuple[Json, ...]


def _case(name: str, schema: Json, valid: list[Json], invalid: list[Json]) -> SchemaCase:
    return SchemaCase(name=name, schema=schema, valid=tuple(valid), invalid=tuple(invalid))


def closed(properties: dict[str, Json], required: list[str] | None = None, **more: Json) -> Json:
    """An object of these properties and no others; all are required unless some are named."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


def array(items: Json, **more: Json) -> Json:
    return {"type": "array", "items": items, **more}


STRING: Final[Json] = {"type": "string"}
INTEGER: Final[Json] = {"type": "integer"}
NUMBER: Final[Json] = {"type": "number"}
BOOLEAN: Final[Json] = {"type": "boolean"}
_SHORT: Final[Json] = {"type": "string", "maxLength": 12}
_PERSON: Final[Json] = closed(
    {"name": _SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
)
_TREE: Final[Json] = {
    "$defs": {
        "node": closed(
            {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": array({"$ref": "#/$defs/node"}, maxItems=2),
            }
        )
    },
    "$ref": "#/$defs/node",
}
_CIRCLE: Final[Json] = closed({"kind": {"const": "circle"}, "r": NUMBER})
_SQUARE: Final[Json] = closed({"kind": {"const": "square"}, "side": NUMBER})

BASICS: Final = (
    _case("any", {}, [None, 1, "a", [1, {"b": []}]], []),
    _case("true", {"type": "boolean"}, [True, False], [None, 1, "true"]),
    _case("null", {"type": "null"}, [None], [0, ""]),
    _case("integer", INTEGER, [0, -7, 123456], [1.5, "1", None]),
    _case("number", NUMBER, [0, -1.5, 1e10], ["1", None]),
    _case("string", STRING, ["", 'a "quoted" é\n', "🙂"], [1, None, ["a"]]),
    _case("object", {"type": "object"}, [{}, {"a": {"b": 1}}], [[], 1, "{}"]),
    _case("array", {"type": "array"}, [[], [1, "a", None]], [{}, 1]),
    _case("several types", {"type": ["integer", "null"]}, [3, None], ["3", True, 1.5]),
    _case("enum of strings", {"enum": ["red", "green", "blue"]}, ["red", "blue"], ["Red", "", 1]),
    _case(
        "enum of all kinds",
        {"enum": [1, "1", None, True, [1], {"a": 1}]},
        [1, "1", None, [1], {"a": 1}],
        [2, False],
    ),
    _case("const", {"const": {"version": 2}}, [{"version": 2}], [{"version": 3}, {}]),
    _case("const string", {"const": 'a/b "c" \\d'}, ['a/b "c" \\d'], ["a/b"]),
)
STRINGS: Final = (
    _case("minLength", {"type": "string", "minLength": 3}, ["abc", "éèê"], ["ab", ""]),
    _case("maxLength", {"type": "string", "maxLength": 4}, ["", "abcd", "日本語"], ["abcde"]),
    _case(
        "both lengths",
        {"type": "string", "minLength": 2, "maxLength": 3},
        ["ab", "abc"],
        ["a", "abcd"],
    ),
    _case(
        "pattern",
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        ["AB-123"],
        ["ab-123", "AB-12", "xAB-123"],
    ),
    _case(
        "pattern anywhere", {"type": "string", "pattern": "cat|dog"}, ["cat", "a dog!"], ["bird"]
    ),
    _case(
        "pattern classes",
        {"type": "string", "pattern": "^\\d{2,4}\\s?(am|pm)$"},
        ["12 am", "1230pm"],
        ["1am", "12  pm"],
    ),
    _case(
        "date", {"type": "string", "format": "date"}, ["2026-11-27"], ["27.11.2026", "2026-13-01"]
    ),
    _case(
        "date-time",
        {"type": "string", "format": "date-time"},
        ["2026-11-27T10:20:30Z", "2026-11-27T10:20:30.5+01:00"],
        ["2026-11-27"],
    ),
    _case("time", {"type": "string", "format": "time"}, ["10:20:30Z"], ["25:00:00Z", "noon"]),
    _case("email", {"type": "string", "format": "email"}, ["a.b@example.org"], ["a.b", "@x"]),
    _case(
        "uuid",
        {"type": "string", "format": "uuid"},
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567"],
    ),
    _case("ipv4", {"type": "string", "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256", "10.0.0"]),
    _case(
        "hostname", {"type": "string", "format": "hostname"}, ["www.example.org"], ["-a.org", "a b"]
    ),
    _case("uri", {"type": "string", "format": "uri"}, ["https://example.org/a?b=c"], ["not a uri"]),
)
NUMBERS: Final = (
    _case("minimum", {"type": "integer", "minimum": 10}, [10, 11, 4000], [9, -1, 0]),
    _case("maximum", {"type": "integer", "maximum": -3}, [-3, -100], [-2, 0, 3]),
    _case(
        "a range",
        {"type": "integer", "minimum": -5, "maximum": 127},
        [-5, 0, 99, 127],
        [-6, 128, 1000],
    ),
    _case(
        "exclusive bounds",
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
        [1, 9],
        [0, 10],
    ),
    _case(
        "a range of numbers",
        {"type": "number", "minimum": 0, "maximum": 1},
        [0, 0.25, 1],
        [-0.1, 1.01, 2],
    ),
    _case(
        "multipleOf", {"type": "integer", "multipleOf": 5, "minimum": 0}, [0, 5, 100], [3, 7, 101]
    ),
)
ARRAYS: Final = (
    _case("items", array(INTEGER), [[], [1, 2]], [["a"], [1, None]]),
    _case("minItems", array(STRING, minItems=2), [["a", "b"], ["a", "b", "c"]], [["a"], []]),
    _case("maxItems", array(BOOLEAN, maxItems=2), [[], [True, False]], [[True, True, True]]),
    _case(
        "exactly three",
        array(NUMBER, minItems=3, maxItems=3),
        [[1, 2.5, 3]],
        [[1, 2], [1, 2, 3, 4]],
    ),
    _case(
        "prefixItems",
        {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
        [["a", 1]],
        [[1, "a"], ["a", 1, 2], ["a"]],
    ),
    _case(
        "a matrix",
        array(array(INTEGER, minItems=2, maxItems=2), minItems=2, maxItems=2),
        [[[1, 2], [3, 4]]],
        [[[1], [2]], []],
    ),
    _case(
        "people",
        array(_PERSON, minItems=1, maxItems=3),
        [[{"name": "Ann", "age": 3}]],
        [[], [{"name": "Ann"}]],
    ),
)
OBJECTS: Final = (
    _case(
        "closed",
        closed({"a": INTEGER, "b": STRING}),
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"a": 1, "b": "x", "c": 1}, {"a": "1", "b": "x"}],
    ),
    _case(
        "optional",
        closed({"a": INTEGER, "b": STRING, "c": BOOLEAN}, required=["b"]),
        [{"b": ""}, {"a": 1, "b": "", "c": True}],
        [{"a": 1}, {}],
    ),
    _case(
        "open",
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
        [{"a": 1}, {"a": 1, "z": [None]}],
        [{}, {"a": "x"}],
    ),
    _case(
        "typed others",
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": INTEGER},
        [{}, {"a": "x", "n": 3}],
        [{"a": "x", "n": "3"}],
    ),
    _case(
        "a map",
        {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
        [{}, {"x": 0.5, "y": 2}],
        [{"x": -1}, {"x": "1"}],
    ),
    _case(
        "patternProperties",
        {"type": "object", "patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
        [{}, {"x_a": 1}],
        [{"y": 1}, {"x_a": "1"}],
    ),
    _case("nothing in it", closed({}), [{}], [{"a": 1}, []]),
    _case(
        "nested",
        closed({"user": _PERSON, "tags": array(_SHORT, maxItems=2)}),
        [{"user": {"name": "A", "age": 1}, "tags": ["x"]}],
        [{"user": {}, "tags": []}],
    ),
    _case(
        "deep",
        closed({"a": closed({"b": closed({"c": closed({"d": {"enum": [1, 2]}})})})}),
        [{"a": {"b": {"c": {"d": 2}}}}],
        [{"a": {"b": {"c": {"d": 3}}}}],
    ),
    _case(
        "names with signs",
        closed({"a b": INTEGER, 'é"x': INTEGER, "$id_": INTEGER}),
        [{"a b": 1, 'é"x': 2, "$id_": 3}],
        [{"a b": 1}],
    ),
)
COMBINED: Final = (
    _case(
        "anyOf",
        {"anyOf": [INTEGER, {"type": "string", "maxLength": 3}]},
        [4, "abc"],
        ["abcd", None],
    ),
    _case(
        "oneOf that are apart",
        {"oneOf": [_CIRCLE, _SQUARE]},
        [{"kind": "circle", "r": 1.5}, {"kind": "square", "side": 2}],
        [{"kind": "circle", "side": 1}, {"kind": "disc", "r": 1}],
    ),
    _case("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 6}]}, [2, 6], [1, 7]),
    _case(
        "allOf objects",
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
            ]
        },
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}],
    ),
    _case(
        "nullable",
        closed({"note": {"anyOf": [_SHORT, {"type": "null"}]}}),
        [{"note": None}, {"note": "x"}],
        [{"note": 1}, {}],
    ),
    _case(
        "$ref",
        {"$defs": {"p": _PERSON}, "type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2},
        [[], [{"name": "A", "age": 0}]],
        [[{"name": "A"}]],
    ),
    _case(
        "definitions",
        {"definitions": {"c": {"enum": ["x", "y"]}}, **closed({"c": {"$ref": "#/definitions/c"}})},
        [{"c": "x"}],
        [{"c": "z"}],
    ),
    _case(
        "recursive",
        _TREE,
        [{"value": 1, "children": [{"value": 2, "children": []}]}],
        [{"value": 1}, {"value": 10, "children": []}],
    ),
)
RECORDS: Final = (
    _case(
        "weather tool",
        closed(
            {
                "location": _SHORT,
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            }
        ),
        [{"location": "Oslo", "unit": "celsius", "days": 3}],
        [{"location": "Oslo", "unit": "kelvin", "days": 3}],
    ),
    _case(
        "search tool",
        closed(
            {
                "query": {"type": "string", "maxLength": 30},
                "filters": closed(
                    {
                        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
                        "open": BOOLEAN,
                    },
                    required=[],
                ),
            },
            required=["query"],
        ),
        [{"query": "x"}, {"query": "x", "filters": {"year": 2020}}],
        [{"filters": {}}, {"query": "x", "filters": {"year": 1}}],
    ),
    _case(
        "calendar event",
        closed(
            {
                "title": _SHORT,
                "start": {"type": "string", "format": "date-time"},
                "guests": array({"type": "string", "format": "email"}, maxItems=2),
            }
        ),
        [{"title": "x", "start": "2026-01-01T00:00:00Z", "guests": []}],
        [{"title": "x", "start": "soon", "guests": []}],
    ),
    _case(
        "invoice",
        closed(
            {
                "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
                "lines": array(
                    closed(
                        {
                            "item": _SHORT,
                            "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
                            "price": {"type": "number", "minimum": 0},
                        }
                    ),
                    minItems=1,
                    maxItems=2,
                ),
                "paid": BOOLEAN,
            }
        ),
        [
            {
                "number": "INV-0001",
                "lines": [{"item": "x", "quantity": 1, "price": 2.5}],
                "paid": True,
            }
        ],
        [{"number": "1", "lines": [], "paid": True}],
    ),
    _case(
        "classification",
        closed(
            {
                "label": {"enum": ["positive", "neutral", "negative"]},
                "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            }
        ),
        [{"label": "neutral", "confidence": 0.5}],
        [{"label": "good", "confidence": 0.5}],
    ),
    _case(
        "extraction",
        closed(
            {
                "people": array(_SHORT, maxItems=3),
                "places": array(_SHORT, maxItems=3),
                "year": {"type": ["integer", "null"], "minimum": 0, "maximum": 3000},
            }
        ),
        [{"people": ["A"], "places": [], "year": None}],
        [{"people": [], "places": []}],
    ),
    _case(
        "steps",
        closed(
            {
                "steps": array(
                    closed({"thought": {"type": "string", "maxLength": 24}, "done": BOOLEAN}),
                    minItems=1,
                    maxItems=2,
                ),
                "answer": INTEGER,
            }
        ),
        [{"steps": [{"thought": "", "done": True}], "answer": 4}],
        [{"steps": [], "answer": 4}],
    ),
    _case(
        "geometry",
        closed(
            {
                "type": {"const": "Point"},
                "coordinates": array(
                    {"type": "number", "minimum": -180, "maximum": 180}, minItems=2, maxItems=2
                ),
            }
        ),
        [{"type": "Point", "coordinates": [1, -2.5]}],
        [{"type": "Point", "coordinates": [1]}],
    ),
    _case(
        "package",
        closed(
            {
                "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,13}$"},
                "version": {"type": "string", "pattern": "^[0-9]{1,2}\\.[0-9]{1,2}\\.[0-9]{1,2}$"},
                "private": BOOLEAN,
            },
            required=["name", "version"],
        ),
        [{"name": "a-b", "version": "1.2.3"}],
        [{"name": "A", "version": "1.2.3"}],
    ),
    _case(
        "chess move",
        {"type": "string", "pattern": "^([KQRBN]?[a-h][1-8]|O-O(-O)?)$"},
        ["Nf3", "e4", "O-O"],
        ["Nf9", "x"],
    ),
    _case(
        "config",
        closed(
            {
                "log": {"enum": ["debug", "info", "error"]},
                "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                "hosts": array({"type": "string", "format": "ipv4"}, minItems=1, maxItems=2),
            }
        ),
        [{"log": "info", "port": 80, "hosts": ["1.2.3.4"]}],
        [{"log": "info", "port": 0, "hosts": ["1.2.3.4"]}],
    ),
)
CASES: Final = BASICS + STRINGS + NUMBERS + ARRAYS + OBJECTS + COMBINED + RECORDS

UNSUPPORTED: Final[tuple[tuple[str, Json], ...]] = (
    ("uniqueItems", array(INTEGER, uniqueItems=True)),
    ("contains", {"type": "array", "contains": INTEGER}),
    ("minProperties", {"type": "object", "minProperties": 2}),
    ("maxProperties", {"type": "object", "maxProperties": 2}),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("not", {"not": INTEGER}),
    ("if", {"if": INTEGER, "then": {"minimum": 3}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    ("format", {"type": "string", "format": "unheard-of"}),
    ("oneOf", {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]}),
)
"""Keywords that no grammar of this kind holds to, each in a schema. They have to be refused."""


def composed(count: int) -> list[Json]:
    """Schemas as many as wanted: those of the cases, then records and lists of some of them, with
    records within, and with references."""
    draw = random.Random(count)
    found = [case.schema for case in CASES]
    parts = [schema for schema in found if not str(schema).count("$")]
    while len(found) < count:
        fields = _fields(draw, parts, most=4)
        if draw.random() < 0.3:
            within = _fields(draw, parts, most=2)
            fields[draw.choice(_NAMES)] = closed(within, required=_needed(draw, within))
        found.append(_whole(draw, fields))
    return found[:count]


def _fields(draw: random.Random, parts: list[Json], most: int) -> dict[str, Json]:
    return {name: draw.choice(parts) for name in draw.sample(_NAMES, draw.randint(1, most))}


def _needed(draw: random.Random, fields: dict[str, Json]) -> list[str]:
    return [name for name in fields if draw.random() < 0.8]


def _whole(draw: random.Random, fields: dict[str, Json]) -> Json:
    """An object of these fields or a list of such, as they stand or as definitions."""
    shown, definitions = fields, {}
    if draw.random() < 0.3:
        definitions = {"$defs": fields}
        shown = {name: {"$ref": f"#/$defs/{quote(name)}"} for name in fields}
    record = closed(shown, required=_needed(draw, fields))
    if draw.random() < 0.2:
        record = array(record, minItems=1, maxItems=draw.randint(1, 3))
    return record | definitions


_NAMES: Final = (
    *("id", "name", "title", "status", "price", "items", "created_at", "owner", "tags", "score"),
    *("description", "address", "unit", "result", "reason", "options", "language", "année"),
)
