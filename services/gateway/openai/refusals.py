"""What workers refuse, by the names of the client's own fields."""

import re
from typing import Final

from precast.errors import InvalidRequest
from precast.json_schema import place_of, without_idle
from services.gateway.openai.errors import invalid
from services.gateway.openai.tools.use import ToolUse

_CONSTRAINT: Final = "constraint: "
_DIMENSIONS: Final = "dimensions: "
"""What workers begin their refusals of these with."""
_GRAMMARS: Final = ("grammar", "guided_grammar", "structured_outputs")
"""Fields in which clients write grammars."""
_KEYWORDS: Final = re.compile(r"not supported: (.+)$")
_PARAMETERS: Final = {"responses": "parameters", "messages": "input_schema"}
"""Where the clients of an endpoint write a tool's schema."""


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


def refused_tool(
    error: Exception, use: ToolUse, endpoint: str, *, harmony: bool = False
) -> Exception:
    """A worker's refusal of a keyword, with the tool that has it; as it was if none has.

    ``harmony``: whose grammar holds all calls to their schemas."""
    found = _KEYWORDS.search(str(error)) if isinstance(error, InvalidRequest) else None
    if found is None or not str(error).startswith(_CONSTRAINT):
        return error
    keywords = frozenset(found[1].split(", "))
    for place, tool in zip(use.places, use.tools, strict=True):
        schema = without_idle(tool.function.schema_of_arguments)
        within = place_of(keywords, schema) if harmony or use.holds(tool) else None
        if within is not None:
            path = f"tools[{place}].{_PARAMETERS.get(endpoint, 'function.parameters')}{within}"
            reason = f"{found[0]}, in the function {tool.function.name!r}"
            return invalid(f"Invalid '{path}': {reason}.", path)
    return error
