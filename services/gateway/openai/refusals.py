"""What workers refuse, by the names of the client's own fields."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from precast.errors import InvalidRequest
from precast.json_schema import place_of, without_idle
from services.gateway.openai.errors import invalid
from services.gateway.openai.plan import Plan
from services.gateway.openai.refusal_spots import spots_of
from services.gateway.openai.structured.constraint import Asked
from services.gateway.openai.written_names import path_as_written

_CONSTRAINT: Final = "constraint: "
_DIMENSIONS: Final = "dimensions: "
"""What workers begin their refusals of these with."""
_GRAMMARS: Final = ("grammar", "guided_grammar", "structured_outputs")
"""Fields in which clients write grammars."""
_KEYWORDS: Final = re.compile(r"not supported: (.+)$")
_WITHIN_TOOLS: Final = re.compile(r"/\$defs/(?:tool_\d+|answer)(?=/)")
"""Where a schema is moved that becomes a part of another one."""
_PARAMETERS: Final = {"responses": "parameters", "messages": "input_schema"}
"""Where the clients of an endpoint write a tool's schema."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a client has written what an answer is held to."""

    path: str
    schema: Any
    """Without what asks nothing; None of a grammar."""
    function: str = ""
    """Of which it is."""


def named_refusal(error: Exception, plan: Plan) -> Exception:
    """A worker's refusal, with the client's field that it is about: that which a grammar came
    from, or the one of embeddings that the worker knows more of."""
    text = str(error)
    if not isinstance(error, InvalidRequest):
        return error
    if text.startswith(_DIMENSIONS):
        return invalid(f"Invalid 'dimensions': {text.removeprefix(_DIMENSIONS)}.", "dimensions")
    if text.startswith(_CONSTRAINT) and (places := list(_places(plan))):
        return _refused(text.removeprefix(_CONSTRAINT), places, plan)
    return error


def _refused(reason: str, places: list[_Place], plan: Plan) -> Exception:
    if len(places) > 1 or plan.asked is None or plan.asked.field not in _GRAMMARS:
        reason = reason.removeprefix("lark: ")  # the client wrote schemas, which became a grammar
    reason = _WITHIN_TOOLS.sub("", reason)
    if found := _KEYWORDS.search(reason):
        keywords = frozenset(found[1].split(", "))
        for place in places:
            if (within := place_of(keywords, place.schema)) is not None:
                return _told(place.path + within, found[0], place.function)
    spots = [(place, within) for place in places for within in spots_of(reason, place.schema)]
    if len(spots) == 1:
        [(place, within)] = spots
        return _told(place.path + within, reason, place.function)
    meant = {place.path: place for place, _ in spots} or {place.path: place for place in places}
    if len(meant) > 1:
        return _told("tools", reason)
    [place] = meant.values()
    return _told(place.path, reason, place.function)


def _told(path: str, reason: str, function: str = "") -> Exception:
    where = f", in the function {function!r}" if function else ""
    return invalid(f"Invalid '{path}': {reason}{where}.", path)


def _places(plan: Plan) -> Iterator[_Place]:
    """Tools first: with several, and an answer's own schema, it is mostly one of theirs."""
    use, parameters = plan.reading.tools, _PARAMETERS.get(plan.endpoint, "function.parameters")
    for place, tool in zip(use.places, use.tools, strict=True) if use is not None else ():
        if plan.reading.harmony or (use is not None and use.holds(tool)):
            yield _Place(
                path=f"tools[{place}].{parameters}",
                schema=without_idle(tool.function.schema_of_arguments),
                function=tool.function.name,
            )
    if plan.asked is not None:
        yield _asked(plan.asked, plan)


def _asked(asked: Asked, plan: Plan) -> _Place:
    path = path_as_written(asked.path, plan.endpoint)
    written = asked.constraint.json_schema
    return _Place(path=path, schema=without_idle(json.loads(written)) if written else None)
