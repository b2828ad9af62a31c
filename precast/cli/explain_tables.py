"""Explanations of missing graphs as tables and JSON."""

import json
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from precast.cli.graph_tables import SHOWN_KEY, phase
from precast.proto.graphs.v1 import graphs_service_pb2 as pb

_MAX_VALUE = 60


def to_json(answers: Sequence[pb.ExplainGraphResponse]) -> str:
    """An array with an object for each wanted graph; ``wanted`` or ``have`` is null if absent."""
    return json.dumps([_value(answer) for answer in answers], indent=2, sort_keys=True)


def tables(answers: Sequence[pb.ExplainGraphResponse]) -> RenderableType:
    """For each wanted graph a line on its state and a table of the factors that differ."""
    if not answers:
        return "no graph is missing"
    return Group(*(part for answer in answers for part in (_headline(answer), _table(answer))))


def _headline(answer: pb.ExplainGraphResponse) -> Text:
    words = [answer.key[:SHOWN_KEY], f"batch {answer.factors.get('num_tokens', '?')}:"]
    if not answer.HasField("state"):
        words.append("nobody has asked for it")
    else:
        words.append(phase(answer.state))
        words += [f"({answer.state.error})"] if answer.state.error else []
    return Text(" ".join(words))


def _table(answer: pb.ExplainGraphResponse) -> RenderableType:
    if not answer.nearest:
        return Text("  no graph is published to compare it with")
    table = Table("nearest", "factor", "wanted", "have")
    for near in answer.nearest:
        name = f"{near.key[:SHOWN_KEY]} version {near.version}"
        if not near.differences:
            table.add_row(name, "none differs", "", "")
        for row, difference in enumerate(near.differences):
            shown = (_shown(difference, side) for side in ("wanted", "have"))
            table.add_row("" if row else name, difference.name, *shown)
    return table


def _shown(difference: pb.FactorDifference, side: str) -> str:
    value = str(getattr(difference, side)) if difference.HasField(side) else "-"  # type: ignore[arg-type]
    return value if len(value) <= _MAX_VALUE else value[: _MAX_VALUE - 1] + "…"


def _value(answer: pb.ExplainGraphResponse) -> dict[str, object]:
    return {
        "key": answer.key,
        "factors": dict(answer.factors),
        "phase": phase(answer.state) if answer.HasField("state") else None,
        "error": answer.state.error,
        "nearest": [
            {
                "key": near.key,
                "version": near.version,
                "models": list(near.models),
                "differences": {
                    d.name: {
                        "wanted": d.wanted if d.HasField("wanted") else None,
                        "have": d.have if d.HasField("have") else None,
                    }
                    for d in near.differences
                },
            }
            for near in answer.nearest
        ],
    }
