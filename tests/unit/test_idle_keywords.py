"""Keywords of JSON schemas that ask nothing, which generators of schemas write all the same."""

import json
from typing import Any

import jsonschema_rs
import pytest

from precast.errors import InvalidRequest
from precast.json_schema import without_idle
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.constraints.checker import checked
from services.decode_worker.constraints.grammar import grammar_of
from services.decode_worker.constraints.matcher import Vocabulary
from services.decode_worker.constraints.trial import trial
from services.gateway.openai.tools.grammar import json_in_lark
from tests.support.models import VOCABULARY, _tokenizer

VALUES: list[Any] = [None, 1, 2.5, "", "text", [], [1, 1], {}, {"a": 1}, {"a": "b", "not": [1, 1]}]
STRING = {"type": "string"}
IDLE: list[Any] = [
    {"type": "array", "uniqueItems": False},
    {"type": "object", "propertyNames": STRING, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": True, "unevaluatedProperties": {}},
    {"type": "array", "items": STRING, "unevaluatedItems": True, "minContains": 1},
    {"type": "object", "dependentRequired": {}, "dependentSchemas": {}},
    {"type": ["integer", "string"], "format": "int32"},
    {"type": "string", "format": "password", "minLength": 1},
    {"type": "string", "format": "path"},
    {"type": "integer", "not": False, "if": {"minimum": 9}},
    {"type": "object", "properties": {"a": {"not": {}}, "not": {"uniqueItems": False}}},
    {"anyOf": [{"type": "array", "uniqueItems": False}, {"const": {"uniqueItems": True}}]},
    {"$defs": {"if": {"type": "string", "format": "binary"}}, "$ref": "#/$defs/if"},
    True,
]
BINDING: list[Any] = [
    {"type": "array", "uniqueItems": True},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"contains": {"type": "integer"}, "minContains": 2},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"type": "string", "format": "int64"},
    {"not": {"type": "string"}},
    {"const": {"uniqueItems": False, "not": {}}},
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(_tokenizer().to_str(), VOCABULARY, (256,))


def refused(vocabulary: Vocabulary, schema: Any) -> str:
    asked = pb.OutputConstraint(json_schema=json.dumps(schema))
    return trial(vocabulary, grammar_of(asked))


@pytest.mark.parametrize("schema", IDLE, ids=json.dumps)
def test_what_asks_nothing_is_no_reason_to_refuse(vocabulary: Vocabulary, schema: Any) -> None:
    before, after = (
        jsonschema_rs.validator_for(each).is_valid for each in (schema, without_idle(schema))
    )
    assert list(map(before, VALUES)) == list(map(after, VALUES))
    assert refused(vocabulary, schema) == ""


@pytest.mark.parametrize("schema", BINDING, ids=json.dumps)
def test_what_asks_something_stays(schema: Any) -> None:
    assert without_idle(schema) == schema


@pytest.mark.parametrize("schema", [False, {"not": {}}])
def test_a_schema_that_nothing_fits_is_refused_as_such(vocabulary: Vocabulary, schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="json_schema: allows no output"):
        grammar_of(pb.OutputConstraint(json_schema=json.dumps(schema)))
    within = pb.OutputConstraint(lark=f"start: {json_in_lark(schema)}\n")
    assert checked(vocabulary, grammar_of(within)).startswith("constraint: lark: ")


@pytest.mark.parametrize("text", ['{"maximum": 1e999}', '{"enum": [1e999]}'])
def test_numbers_that_nobody_reads_are_named(vocabulary: Vocabulary, text: str) -> None:
    """And not called a lack of memory."""
    found = checked(vocabulary, grammar_of(pb.OutputConstraint(json_schema=text)))
    assert found.startswith("constraint: json_schema: ")
    assert "memory" not in found


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("byte", "YWI=", "abc"),
        ("base64url", "a-_b", "a+/b"),
        ("uuid4", "a2d8d378-938b-41e3-ab71-ceefdecc54b1", "a2d8d378-938b-11e3-ab71-ceefdecc54b1"),
    ],
)
def test_formats_that_are_patterns(vocabulary: Vocabulary, name: str, good: str, bad: str) -> None:
    schema = json.dumps({"type": "string", "format": name})
    grammar = grammar_of(pb.OutputConstraint(json_schema=schema))

    def takes(text: str) -> bool:
        matcher = vocabulary.compile(grammar, quick=False)
        for token in _tokenizer().encode(json.dumps(text)).ids:
            matcher.take(token)
        return not matcher.error

    assert takes(good)
    assert not takes(bad)
