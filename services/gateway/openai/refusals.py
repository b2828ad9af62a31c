"""What workers refuse, by the names of the client's own fields."""

from typing import Final

from precast.errors import InvalidRequest
from services.gateway.openai.errors import invalid

_CONSTRAINT: Final = "constraint: "
_DIMENSIONS: Final = "dimensions: "
"""What workers begin their refusals of these with."""


def named_refusal(error: Exception, field: str | None) -> Exception:
    """A worker's refusal, with the client's field that it is about: that which a grammar came
    from, or the one of embeddings that the worker knows more of."""
    if not isinstance(error, InvalidRequest):
        return error
    text = str(error)
    for prefix, name in ((_CONSTRAINT, field), (_DIMENSIONS, "dimensions")):
        if name is not None and text.startswith(prefix):
            return invalid(f"Invalid '{name}': {text.removeprefix(prefix)}.", name)
    return error
