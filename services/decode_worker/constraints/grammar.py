"""Grammars as requests give them, and as llguidance reads them."""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from precast.errors import InvalidRequest
from precast.json_schema import without_idle
from precast.proto.decode.v1 import decode_service_pb2 as pb

MAX_BYTES: Final = 256 << 10
"""Of a grammar's text; larger ones would mostly take too long to compile anyway."""
JSON_OPTIONS: Final[Any] = {
    # A blank, or a new line with its indentation, wherever JSON may have blanks: models that have
    # nothing to say would go on with blanks for ever.
    "whitespace_pattern": r"[ ]|\n[ ]{0,40}",
    # whatever the schema's own options say: nothing is left out in silence
    "lenient": False,
    "coerce_one_of": False,
}
_UNIMPLEMENTED: Final = re.compile(r"Unimplemented keys: \[(.*?)\]")
_MAX_REASON: Final = 300


@dataclass(frozen=True, kw_only=True)
class Grammar:
    kind: str
    """As the field of ``OutputConstraint`` is called."""
    text: str


def grammar_of(constraint: pb.OutputConstraint) -> Grammar:
    """Raises InvalidRequest for one that is empty, too long or no JSON."""
    kind = constraint.WhichOneof("grammar")
    if kind is None:
        raise InvalidRequest("constraint: one of json_schema, regex and lark is needed")
    text: str = getattr(constraint, kind)
    if (size := len(text.encode())) > MAX_BYTES:
        raise InvalidRequest(f"constraint: {kind} has {size} bytes: at most {MAX_BYTES}")
    return Grammar(kind=kind, text=_schema(text) if kind == "json_schema" else text)


def _schema(text: str) -> str:
    """The schema as an object, without keywords that ask nothing. Raises InvalidRequest."""
    try:
        given = json.loads(text)
        schema = without_idle(given)
    except ValueError as error:
        raise InvalidRequest(f"constraint: json_schema is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("constraint: json_schema is nested too deeply") from None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("constraint: json_schema must be an object or a boolean")
    if schema is False:
        raise InvalidRequest("constraint: json_schema: allows no output")
    if schema is True:
        return "{}"
    return text if schema == given else json.dumps(schema)


def refusal(kind: str, reason: str) -> str:
    """Why a grammar can't be held to, in one line that names the keyword."""
    unsupported = _UNIMPLEMENTED.search(reason)
    if unsupported is not None:
        return f"constraint: {kind}: not supported: {unsupported[1].replace(chr(34), '')}"
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error: ")), "")  # of regexes
    first = lines[0] if lines else "not a grammar"
    return f"constraint: {kind}: {told.removeprefix('error: ') or first}"[:_MAX_REASON]
