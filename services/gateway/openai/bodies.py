"""From a body's bytes to a checked request, or to a 400 that says what is wrong and where."""

from collections.abc import Mapping
from typing import Any, Final, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from services.gateway.openai.errors import ApiError, invalid
from services.gateway.openai.messages import FieldError, UnsupportedField
from services.gateway.openai.structure import MAX_VALUES, has_too_many_values

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_KINDS: Final = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
}
"""JSON's words for what Python's validator wants."""
_MAX_NAMED: Final = 16
_MAX_NAME: Final = 64


_B = TypeVar("_B", bound=BaseModel)


def parse_body(kind: type[_B], body: bytearray, *, strict: bool = False) -> tuple[_B, list[str]]:
    """The request, and its top-level fields that are ignored because nobody knows them.

    Raises ``ApiError`` 400; ``strict``: for unknown fields too."""
    value = _parse_json(body)
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    unknown = unknown_fields(kind, value)
    if strict and unknown:
        raise invalid(f"Unrecognized request argument supplied: {unknown[0]}.", unknown[0])
    try:
        return kind.model_validate(value), unknown
    except ValidationError as error:
        raise from_validation(error, value) from None


def unknown_fields(kind: type[BaseModel], body: dict[str, Any]) -> list[str]:
    """Fields of a body that its model has never heard of; a model may know more than it has."""
    served = {field.alias or name for name, field in kind.model_fields.items()}
    accepted = getattr(kind, "accepted", frozenset[str]())
    return sorted(body.keys() - served - accepted)


def named(fields: list[str]) -> str:
    """Fields for a header: some of them, and not more of each than one wants to read."""
    shown = [quote(name[:_MAX_NAME], safe="", errors="replace") for name in fields[:_MAX_NAMED]]
    return ", ".join(shown)


def _parse_json(body: bytearray) -> Any:
    if body.startswith(_BYTE_ORDER_MARK):
        del body[: len(_BYTE_ORDER_MARK)]
    if not body or body.isspace():
        raise invalid("The request body is empty; it must be a JSON object.")
    if has_too_many_values(body):
        raise invalid(f"The request body has more than {MAX_VALUES} values.")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(_json_problem(body, str(error))) from None


def _json_problem(text: bytearray, reason: str) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        wrong = text[error.start]
        return f"The request body is not UTF-8: byte 0x{wrong:02x} at position {error.start}."
    if reason.startswith("recursion limit exceeded"):
        return "The request body is nested too deeply: at most 200 levels are allowed."
    if reason.startswith("number out of range"):
        return "The request body has a number that is too long: at most 4300 digits are allowed."
    if "hex escape" in reason:
        return f"The request body has a broken escape of a character: {reason}."
    return f"The request body is not valid JSON: {reason}."


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """The first failure, with the path that the client wrote as ``param``."""
    first: Mapping[str, Any] = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        path = _path((*first["loc"], cause.field), body)
        code = "unsupported_parameter" if isinstance(cause, UnsupportedField) else None
        return invalid(f"'{path}' {cause.reason}.", path, code)
    path = _path(_location(first), body)
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {path}.", path)
    if first["type"] in ("missing", "union_tag_not_found"):
        return invalid(f"Missing required parameter: '{path}'.", path)
    return invalid(f"Invalid '{path}': {_reason(first)}.", path)


def _location(failure: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where the failure is; of an object of no known kind, its field that names the kind."""
    location: tuple[int | str, ...] = failure["loc"]
    kind = failure.get("ctx", {}).get("discriminator")
    if not kind:
        return location
    # Where a function tells the kinds apart, it is the field's usual name that it looks at.
    return (*location, "type" if kind.endswith("()") else kind.strip("'"))


def _reason(failure: Mapping[str, Any]) -> str:
    kind, context = failure["type"], failure.get("ctx", {})
    if kind == "union_tag_invalid":
        return f"{context['tag']!r} is not supported; it may be {context['expected_tags']}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in ("too_long", "too_short"):
        bound = "at most" if kind == "too_long" else "at least"
        limit = context.get("max_length", context.get("min_length"))
        return f"has {context['actual_length']} items; it must have {bound} {limit}"
    message = str(failure["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "must be").replace("String should", "must")


def _path(location: tuple[int | str, ...], body: Any) -> str:
    """``messages[1].content[0].text``: the steps of a location that are in the body.

    The others are the validator's own, such as which form of a union it tried. A field that is
    missing is the last step, and not in the body.
    """
    path = ""
    for position, step in enumerate(location):
        if isinstance(step, int) and isinstance(body, list):
            path += f"[{step}]"
            body = body[step] if step < len(body) else None
        elif isinstance(body, dict) and (step in body or position == len(location) - 1):
            path += f".{step}" if path else str(step)
            body = body.get(step)
    return path
