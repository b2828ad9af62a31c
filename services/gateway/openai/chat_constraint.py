"""The grammar of a chat's answer: from its response format, its tools and its reasoning."""

import json
import re
from collections.abc import Sequence
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.errors import invalid
from services.gateway.openai.harmony import harmony_lark
from services.gateway.openai.interpret import Reading, Thinking
from services.gateway.openai.reasoning import CLOSE, OPEN
from services.gateway.openai.structured.constraint import constraint_of, schema_constraint
from services.gateway.openai.structured.fields import StructureFields
from services.gateway.openai.tools.grammar import json_in_lark, strict_lark
from services.gateway.openai.tools.use import ToolUse

_START: Final = re.compile(r"^(\s*)start(\s*):", re.MULTILINE)
_SLASH: Final = re.compile(r"\\.|/", re.DOTALL)


def _escaped(found: re.Match[str]) -> str:
    return r"\/" if found[0] == "/" else found[0]


def chat_constraint(
    body: StructureFields, use: ToolUse | None, tokenizer: ModelTokenizer, reading: Reading
) -> pb.OutputConstraint | None:
    """None for an answer that may be anything. Raises ``ApiError`` 400."""
    if reading.harmony:
        return _in_channels(body, use, tokenizer)
    constraint = _without_reasoning(body, use, tokenizer)
    return None if constraint is None else _behind_reasoning(constraint, reading.thinking)


def _in_channels(
    body: StructureFields, use: ToolUse | None, tokenizer: ModelTokenizer
) -> pb.OutputConstraint | None:
    """Calls have their own schema wherever an answer is held to anything."""
    asked, forced = constraint_of(body), use is not None and use.mode == "forced"
    if asked is None and not forced and not (use is not None and use.strict):
        return None
    lark = harmony_lark(
        None if asked is None or forced else _rule(asked),
        () if use is None else use.tools,
        lambda mark: _in_lark(mark, tokenizer),
        forced=forced,
    )
    return pb.OutputConstraint(lark=lark)


def _without_reasoning(
    body: StructureFields, use: ToolUse | None, tokenizer: ModelTokenizer
) -> pb.OutputConstraint | None:
    asked = constraint_of(body)
    if use is None:
        return asked
    if use.mode == "forced":
        return schema_constraint(use.schema(), "tools")
    if asked is not None and not asked.HasField("json_schema"):
        raise invalid("'tools' can't be combined with a grammar.", "tools")
    if asked is None and not use.strict:
        return None
    content = None if asked is None else asked.json_schema
    marks = [_in_lark(mark, tokenizer) for mark in use.syntax.begins[:1]]
    if use.form.syntax.bare and not use.form.instructs:
        marks = []  # a call needs no mark
    lark = strict_lark(use.form, use.tools, marks=marks, content=content, several=use.several)
    return pb.OutputConstraint(lark=lark)


def _in_lark(mark: str, tokenizer: ModelTokenizer) -> str:
    """A text, or a token that is none."""
    special = special_ids([mark], tokenizer)
    return f"<[{special[0]}]>" if special else json.dumps(mark)


def special_ids(marks: Sequence[str], tokenizer: ModelTokenizer) -> list[int]:
    """Ids of those marks that are special tokens, which texts usually leave out."""
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    return [number for number, token in added.items() if token.special and token.content in marks]


def _behind_reasoning(constraint: pb.OutputConstraint, thinking: Thinking) -> pb.OutputConstraint:
    """The same for an answer that may begin with reasoning, which is free."""
    if thinking == "none":
        return constraint
    head = "" if thinking == "opened" else json.dumps(OPEN)
    lines = [
        "%llguidance {}",
        f"start: reasoning{'' if thinking == 'opened' else '?'} answer",
        rf"reasoning: {head} thoughts /\s*/",
        f"thoughts[lazy]: /(.|\\n)*/ {json.dumps(CLOSE)}",
        _rule(constraint),
    ]
    return pb.OutputConstraint(lark="\n".join([*lines, ""]))


def _rule(constraint: pb.OutputConstraint) -> str:
    """The rule ``answer``, and those that it needs."""
    if constraint.HasField("json_schema"):
        return f"answer: {json_in_lark(json.loads(constraint.json_schema))}"
    if constraint.HasField("regex"):
        return f"answer: /{_SLASH.sub(_escaped, constraint.regex)}/"
    lark = constraint.lark.removeprefix("%llguidance {}\n")
    return _START.sub(r"\1answer\2:", lark, count=1)
