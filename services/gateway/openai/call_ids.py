"""Names of calls, by which their results refer to them."""

import hashlib
import uuid
from typing import Final

_SHORT: Final = 9


def new_call_id(*, short: bool, prefix: str = "call") -> str:
    """``short``: nine letters and digits, as some chat templates demand."""
    name = uuid.uuid4().hex
    return name[:_SHORT] if short else f"{prefix}_{name[:24]}"


def short_call_id(name: str) -> str:
    """An id for templates that want nine letters and digits; the same for the same name."""
    if len(name) == _SHORT and name.isascii() and name.isalnum():
        return name
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_SHORT]
