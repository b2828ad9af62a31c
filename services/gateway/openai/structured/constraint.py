"""From a request's fields to the grammar that workers hold an answer to."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai.errors import ApiError, invalid
from services.gateway.openai.structured.fields import (
    JsonObjectFormat,
    JsonSchemaFormat,
    Schema,
    StructuredOutputs,
    StructureFields,
    TextFormat,
)
from services.gateway.openai.structured.gbnf import GbnfError, is_gbnf, lark_of

MAX_TEXT: Final = 256 << 10
"""Characters of a schema, an expression or a grammar."""
ANY_OBJECT: Final = {"type": "object"}
_SPECIAL: Final = re.compile(r"[\\.+*?()|\[\]{}^$/]")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a field says that the answer must be."""

    field: str
    path: str
    """Of the schema or the grammar within the field, or the field."""
    constraint: pb.OutputConstraint


def constraint_of(body: StructureFields) -> pb.OutputConstraint | None:
    """What the answer must be; None for any text. Raises ``ApiError`` 400."""
    found = list(_asked(body))
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise invalid(f"'{second}' can't be combined with '{first}'.", second)
    return found[0].constraint if found else None


def asked_of(body: StructureFields) -> Asked | None:
    """Where that is said."""
    return next(_asked(body), None)


def schema_constraint(schema: Any, field: str) -> pb.OutputConstraint:
    """Raises ``ApiError`` 400 if it is too large."""
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return pb.OutputConstraint(json_schema=_bounded(text, field))


def _asked(body: StructureFields) -> Iterator[Asked]:
    if body.response_format is not None and not isinstance(body.response_format, TextFormat):
        yield _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield _of_outputs(body.structured_outputs)
    if body.guided_json is not None:
        yield _of("guided_json", _json, body.guided_json)
    if body.guided_regex is not None:
        yield _of("guided_regex", _regex, body.guided_regex)
    if body.guided_choice is not None:
        yield _of("guided_choice", _choice, body.guided_choice)
    if body.guided_grammar is not None:
        yield _of("guided_grammar", _grammar, body.guided_grammar)
    if body.grammar is not None:
        yield _of("grammar", _grammar, body.grammar)
    if body.json_schema is not None:
        yield _of("json_schema", schema_constraint, body.json_schema)


def _of(
    path: str, made: Callable[[Any, str], pb.OutputConstraint], value: Any, field: str = ""
) -> Asked:
    return Asked(field=field or path, path=path, constraint=made(value, path))


def _of_format(asked: JsonObjectFormat | JsonSchemaFormat) -> Asked:
    path = "response_format.schema"
    schema: Schema | None = None
    if isinstance(asked, JsonSchemaFormat):
        path, schema = "response_format.json_schema.schema", asked.json_schema.schema_
    elif asked.schema_ is not None:
        schema = asked.schema_
    given = ANY_OBJECT if schema is None else schema
    return _of(path, schema_constraint, given, "response_format")


def _of_outputs(asked: StructuredOutputs) -> Asked:
    name = "structured_outputs"
    given = (asked.json_, asked.json_object or None, asked.regex, asked.choice, asked.grammar)
    if sum(value is not None for value in given) != 1:
        wanted = "exactly one of json, json_object, regex, choice and grammar"
        raise invalid(f"Invalid '{name}': it must have {wanted}.", name)
    if asked.json_ is not None:
        return _of(f"{name}.json", _json, asked.json_, name)
    if asked.regex is not None:
        return _of(f"{name}.regex", _regex, asked.regex, name)
    if asked.choice is not None:
        return _of(f"{name}.choice", _choice, asked.choice, name)
    if asked.grammar is not None:
        return _of(f"{name}.grammar", _grammar, asked.grammar, name)
    return _of(f"{name}.json_object", schema_constraint, ANY_OBJECT, name)


def _json(schema: Any, field: str) -> pb.OutputConstraint:
    """A schema, or the text of one."""
    if not isinstance(schema, str):
        return schema_constraint(schema, field)
    _bounded(schema, field)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        raise invalid(f"Invalid '{field}': it is not valid JSON.", field) from None
    if not isinstance(parsed, dict | bool):
        raise invalid(f"Invalid '{field}': a JSON schema is an object.", field)
    return schema_constraint(parsed, field)


def _regex(expression: str, field: str) -> pb.OutputConstraint:
    return pb.OutputConstraint(regex=_bounded(expression, field))


def _choice(choices: Sequence[str], field: str) -> pb.OutputConstraint:
    texts = "|".join(_SPECIAL.sub(r"\\\g<0>", choice) for choice in choices)
    return pb.OutputConstraint(regex=_bounded(f"({texts})", field))


def _grammar(text: str, field: str) -> pb.OutputConstraint:
    """Lark as it is, GBNF translated."""
    _bounded(text, field)
    if not is_gbnf(text):
        return pb.OutputConstraint(lark=text)
    try:
        return pb.OutputConstraint(lark=_bounded(lark_of(text), field))
    except GbnfError as error:
        raise invalid(f"Invalid '{field}': {error}.", field) from None


def _bounded(text: str, field: str) -> str:
    if len(text) > MAX_TEXT:
        raise _too_large(field)
    return text


def _too_large(field: str) -> ApiError:
    return invalid(f"Invalid '{field}': it has more than {MAX_TEXT} characters.", field)
