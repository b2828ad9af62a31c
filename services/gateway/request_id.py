"""A name for each HTTP request: the client's own ``x-request-id``, or one that is made here.

It goes out with the answer, into every line that is logged for the request, and to the decode
workers.
"""

import re
import uuid
from typing import Final

from starlette.types import Scope

HEADER: Final = "x-request-id"
_OF_MESSAGES: Final = "request-id"
"""As Anthropic's clients look for it."""
_KEY: Final = "precast.request_id"
_GOOD: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What can go into logs and headers as it is; anything else is replaced."""


def name_for(given: str) -> str:
    """The name that the client has given, if it is a good one."""
    return given if _GOOD.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def headers_at(path: str) -> tuple[str, ...]:
    """Those of an answer from the path that have the name."""
    return (HEADER, _OF_MESSAGES) if path.startswith("/v1/messages") else (HEADER,)


def named_scope(scope: Scope, name: str) -> Scope:
    """The scope of a request of this name."""
    return {**scope, _KEY: name}


def request_id(scope: Scope) -> str:
    """Of the request of this scope; "" outside of ``RequestIds``."""
    return str(scope.get(_KEY, ""))
