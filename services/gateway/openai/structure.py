"""Bounds how many values a body of JSON has, before they are made.

A parsed value takes some 50 bytes and more, however short it is as text, so that a body of a few
megabytes can become hundreds. Long strings cost what they cost as text.
"""

import re
from typing import Final

MAX_VALUES: Final = 1 << 17
"""Values of one body; prompts of token ids have the most."""
_OPENERS: Final = (b",", b"[", b"{")
_QUOTE: Final = ord('"')
# possessive: a string of megabytes leaves nothing behind to return to
_STRING_OR_OPENER: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[,\[{]', re.DOTALL)


def has_too_many_values(body: bytearray) -> bool:
    """Whether there are more than ``MAX_VALUES``, which commas and brackets outside of strings
    count. What is no JSON gets any answer."""
    if sum(map(body.count, _OPENERS)) <= MAX_VALUES:
        return False
    total = 0
    for found in _STRING_OR_OPENER.finditer(body):
        total += body[found.start()] != _QUOTE
        if total > MAX_VALUES:
            return True
    return False
