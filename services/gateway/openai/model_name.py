"""The field ``model`` of a body, which may be left out where one model is served."""

from typing import Annotated, Any, Final

from pydantic import Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

_MOST: Final = 256
"""Characters."""


def _or_none(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return "" if value is None else check(value)


ModelName = Annotated[
    str,
    Field(min_length=1, max_length=_MOST),
    WrapValidator(_or_none),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1, "maxLength": _MOST}, {"type": "null"}]}
    ),
]
"""Empty: it was left out. What reads bodies puts in the model that is served."""
