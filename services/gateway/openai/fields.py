"""Fields of requests that have several forms: what is accepted, and how a reference shows it."""

import re
from functools import partial
from typing import Annotated, Any, Final, cast

from pydantic import BeforeValidator, PlainValidator, WithJsonSchema

MAX_CHOICES: Final = 128
"""Generations of one HTTP request: prompts times ``n``."""
MAX_INPUTS: Final = 2048
"""Texts to embed in one HTTP request."""
MAX_STOPS: Final = 64
MAX_PROMPT_IDS: Final = 2**20
"""Token ids of one prompt; more than any context has."""
MAX_BIAS: Final = 100
MAX_LOGPROBS: Final = 20
MAX_BAD_WORDS: Final = 1024
_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def whole(value: Any) -> Any:
    """In JSON 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_prompt(value: Any, most: int = MAX_CHOICES) -> Any:
    """``str | list[str] | list[int] | list[list[int]]``, none of them empty."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a non-empty string or array of strings or token ids")
    if type(value[0]) in (int, float):
        return _token_ids(value)
    if len(value) > most:
        raise ValueError(f"has {len(value)} prompts; at most {most} are allowed")
    if all(isinstance(item, str) and item for item in value):
        return value
    if all(isinstance(item, list) and item for item in value):
        return [_token_ids(item) for item in value]
    raise ValueError("must hold only non-empty strings, only token ids, or only arrays of these")


def _token_ids(value: list[Any]) -> list[int]:
    if len(value) > MAX_PROMPT_IDS:
        raise ValueError(f"has a prompt of {len(value)} token ids, more than any model takes")
    ids = value if set(map(type, value)) == {int} else [whole(item) for item in value]
    if not all(type(item) is int and 0 <= item < 2**32 for item in ids):
        raise ValueError("must hold only strings, or only token ids from 0 on")
    return ids


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a non-empty string or an array of them")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    return stops


def _check_bias(value: Any) -> Any:
    """Token ids are JSON keys, hence strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token id to bias")
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(str(key)):
            raise ValueError(f"{str(key)[:40]!r} is not a token id")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} must be from -{MAX_BIAS} to {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


_ID_SCHEMA: Final = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_IDS_SCHEMA: Final = {
    "type": "array",
    "items": _ID_SCHEMA,
    "minItems": 1,
    "maxItems": MAX_PROMPT_IDS,
}
_TEXT_SCHEMA: Final = {"type": "string", "minLength": 1}


def _prompt_schema(most: int) -> WithJsonSchema:
    several = {"type": "array", "minItems": 1, "maxItems": most}
    texts, lists = {**several, "items": _TEXT_SCHEMA}, {**several, "items": _IDS_SCHEMA}
    return WithJsonSchema({"anyOf": [_TEXT_SCHEMA, texts, _IDS_SCHEMA, lists]})


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    _prompt_schema(MAX_CHOICES),
]
"""A text, texts, token ids, or several lists of these."""

Inputs = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(partial(_check_prompt, most=MAX_INPUTS)),
    _prompt_schema(MAX_INPUTS),
]
"""The same, of texts to embed."""

Stop = Annotated[
    list[str],
    BeforeValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_check_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"},
                    "additionalProperties": {
                        "type": "number",
                        "minimum": -MAX_BIAS,
                        "maximum": MAX_BIAS,
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


def prompts_of(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One entry a prompt: text or token ids."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):  # then all of them are
        return [value]
    return cast("list[str | list[int]]", value)
