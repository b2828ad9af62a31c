"""What the clients of an endpoint have called the fields of the chat that their bodies mean."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from services.gateway.openai.errors import ApiError
from services.gateway.openai.plan import Endpoint

_Names = Sequence[tuple[re.Pattern[str], str]]
_RESPONSES: Final[_Names] = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^response_format\.json_schema"), "text.format"),
    (re.compile(r"^response_format"), "text.format"),
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
)
_MESSAGES: Final[_Names] = (
    (re.compile(r"^response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"^reasoning_effort$"), "thinking"),
    (re.compile(r"^stop$"), "stop_sequences"),
    (re.compile(r"^(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
)
_NAMES: Final[Mapping[Endpoint, _Names]] = {"responses": _RESPONSES, "messages": _MESSAGES}


def path_as_written(path: str, endpoint: Endpoint) -> str:
    """A field of the chat, as the client has called it."""
    for pattern, name in _NAMES.get(endpoint, ()):
        if pattern.search(path):
            return pattern.sub(name, path)
    return path


def as_written(error: ApiError, endpoint: Endpoint) -> ApiError:
    """An error about the chat, with the names of the client's own fields."""
    if error.param is None:
        return error
    param = path_as_written(error.param, endpoint)
    return ApiError(
        error.status,
        error.message.replace(f"'{error.param}'", f"'{param}'"),
        kind=error.kind,
        param=param,
        code=error.code,
        headers=error.headers,
    )
