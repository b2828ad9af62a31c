"""What workers refuse, by the names of the client's own fields."""

from typing import Final

from precast.errors import InvalidRequest
from services.gateway.openai.errors import invalid

_CONSTRAINT: Final = "constraint: "
_DIMENSIONS: Final = "dimensions: "
"""What workers begin their refusals of these with."""
_GRAMMARS: Final = ("grammar", "guided_grammar", "structured_outputs")
"""Fields in which clients write grammars."""


def named_refusal(error: Exception, field: str | None) -> Exception:
    """A worker's refusal, with the client's field that it is about: that which a grammar came
    from, or the one of embeddings that the worker knows more of."""
    if not isinstance(error, InvalidRequest):
        return error
    text = str(error)
    for prefix, name in ((_CONSTRAINT, field), (_DIMENSIONS, "dimensions")):
        if name is not None and text.startswith(prefix):
            reason = text.removeprefix(prefix)
            if name not in _GRAMMARS:  # the client wrote schemas, out of which a grammar was made
                reason = reason.removeprefix("lark: ")
            return invalid(f"Invalid '{name}': {reason}.", name)
    return error
