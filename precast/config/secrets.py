"""Passwords in URLs, which must not be shown."""

import re
from typing import Final

_IN_ADDRESS: Final = re.compile(r"(\w+://[^@/\s'\"]*:)[^@/\s'\"]*@")
_IN_QUERY: Final = re.compile(r"([?&]\w*password=)[^&\s'\"]*", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` without the passwords of URLs in it."""
    return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub(r"\1***@", text))
