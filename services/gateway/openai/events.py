"""Server-sent events. One that only brings text is joined from pieces that were made before."""

import json
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from services.gateway.openai.responses import encode, encode_text

DONE: Final = b"data: [DONE]\n\n"
WAITING: Final = b": waiting\n\n"
"""A comment, which clients ignore."""
MARK: Final = "mark"
"""The text in the chunk that ``TextEvents`` is made from."""


def event(chunk: Struct) -> bytes:
    return b"data: %b\n\n" % encode(chunk)


def error_event(body: Mapping[str, Any]) -> bytes:
    """Of OpenAI's error object."""
    return b"data: %b\n\n" % json.dumps(body).encode()


class TextEvents:
    """Events of one choice that differ in their text alone."""

    def __init__(self, chunk: Struct) -> None:
        """``chunk`` has ``MARK`` as its text, and no text of a client's after it."""
        self.before, _, self.after = event(chunk).rpartition(encode_text(MARK))
        """What an event has around its text."""

    def event(self, text: str) -> bytes:
        return self.before + encode_text(text) + self.after
