"""Bounds how many values a body of JSON has, before they are made.

A parsed value takes some 50 bytes and more, however short it is as text, so that a body of a few
megabytes can become hundreds. Long strings cost what they cost as text.
"""

import re
from functools import cache
from typing import Final

MAX_VALUES: Final = 1 << 17
"""Values of one body; prompts of token ids have the most."""
_OPENERS: Final = (b",", b"[", b"{")
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_PLAIN: Final = rb'[^",\[{]*+'


def has_too_many_values(body: bytearray, most: int = MAX_VALUES) -> bool:
    """Whether there are more than ``most``, which commas and brackets outside of strings count.

    What is no JSON gets any answer.
    """
    if sum(map(body.count, _OPENERS)) <= most:
        return False
    return _more_than(most).match(body) is not None


@cache
def _more_than(most: int) -> re.Pattern[bytes]:
    """Matches what has more than so many openers.

    It is one match, at the speed of C, and possessive: megabytes leave nothing to return to.
    """
    up_to_opener = rb"(?:%s(?:%s%s)*+[,\[{])" % (_PLAIN, _STRING, _PLAIN)
    return re.compile(b"%s{%d}+" % (up_to_opener, most + 1), re.DOTALL)
