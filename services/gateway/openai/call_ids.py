"""Names of calls, by which their results refer to them."""

import uuid
from typing import Final

_SHORT: Final = 9


def new_call_id(*, short: bool) -> str:
    """``short``: nine letters and digits, as some chat templates demand."""
    name = uuid.uuid4().hex
    return name[:_SHORT] if short else f"call_{name[:24]}"
