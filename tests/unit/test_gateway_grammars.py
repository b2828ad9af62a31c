"""Grammars that requests lead to, and reasoning in the text of answers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai.interpret import Reading, ThoughtCounter, thinking_of
from services.gateway.openai.parts import Content, Reasoning
from services.gateway.openai.reasoning import ReasoningReader
from services.gateway.openai.structured.gbnf import GbnfError, is_gbnf, lark_of
from services.gateway.openai.tools.fields import Tool
from services.gateway.openai.tools.formats import FORMATS, format_of
from services.gateway.openai.tools.grammar import forced_schema, json_in_lark, strict_lark

# --- GBNF ---


@pytest.mark.parametrize(
    ("gbnf", "lark"),
    [
        ('root ::= "yes" | "no"', 'start: "yes" | "no"\n'),
        ("root ::= [a-z]+ # letters", "start: /[a-z]/+\n"),
        ('root ::= a-b*\na-b ::= "x"{2,}', 'start: r_a_45_b*\nr_a_45_b: "x"{2,}\n'),
        ('root ::= ("a"\n  | "b")?', 'start: ( "a" | "b" )?\n'),
        (r'root ::= "\"\x41\n"', 'start: "\\"A\\n"\n'),
        (r"root ::= [^\"\\\x00-\x1f-]", 'start: /[^"\\\\\\u{0}-\\u{1f}\\-]/\n'),
        ('root ::= "a *b"', 'start: "a *b"\n'),
        ("root ::=", 'start: ""\n'),
        ("root ::= .", "start: /(.|\\n)/\n"),
        ('root ::= ""', 'start: ""\n'),
        ('root ::= "a"{,3}', 'start: "a"{0,3}\n'),
    ],
)
def test_gbnf_as_lark(gbnf: str, lark: str) -> None:
    assert is_gbnf(gbnf)
    assert lark_of(gbnf) == lark


@pytest.mark.parametrize(
    ("gbnf", "reason"),
    [
        ('x ::= "a"', "no rule 'root'"),
        ("root ::= other", "'other' is not defined"),
        ('root ::= ("a"', "brackets of rule 'root'"),
        ('root ::= "a")', "brackets of rule 'root'"),
        ("root ::= <[5]>", "a token such as"),
        ('root ::= "a\n', "is not understood"),
        ("root ::= []", "not understood|is empty"),
        ('root ::= "a"\nroot ::= "b"', "defined twice"),
        (r'root ::= "\xzz"', "is no character"),
        ('"a" root ::= "b"', "doesn't begin with a rule"),
    ],
)
def test_what_is_no_gbnf(gbnf: str, reason: str) -> None:
    with pytest.raises(GbnfError, match=reason):
        lark_of(gbnf)


# --- tools ---

PARAMETERS = {"type": "object", "properties": {"x": {"$ref": "#/$defs/y"}}, "$defs": {"y": {}}}


def tool(name: str, *, strict: bool) -> Tool:
    function = {"name": name, "parameters": PARAMETERS, "strict": strict}
    return Tool.model_validate({"type": "function", "function": function})


def test_references_stay_right_in_a_schema_of_several_tools() -> None:
    schema = forced_schema([tool("a", strict=False), tool("b", strict=False)], several=False)
    moved = schema["$defs"]["tool_1"]
    assert moved["properties"]["x"] == {"$ref": "#/$defs/tool_1/$defs/y"}
    assert moved["$defs"] == {"y": {}}


def test_only_strict_tools_have_strict_arguments() -> None:
    tools = [tool("a", strict=True), tool("b", strict=False)]
    lark = strict_lark(
        FORMATS["hermes"], tools, marks=['"<tool_call>"'], content=None, several=True
    )
    [first, second] = [line for line in lark.splitlines() if line.startswith("body_")]
    assert json.dumps('\n{"name": "a", "arguments": ') in first
    assert '"$ref":"#/$defs/y"' in first
    assert '%json {"type":"object","x-guidance":{' in second


def test_a_schema_in_a_grammar_can_not_choose_to_be_read_leniently() -> None:
    lark = json_in_lark({"type": "object", "x-guidance": {"lenient": True}})
    assert '"lenient":false' in lark
    assert "true" not in lark
    assert json_in_lark(True) == "%json true"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>", "hermes"),
        ("{% if tools %}<tool_call>\n<function=example>", "qwen3_coder"),
        ("{% if tools %}<|python_tag|>", "llama3"),
        ("{% if tools %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|tool|>", "phi4"),
        ("{% if tools %}<start_function_call>", "gemma"),
        ("{% if tools %}Json 格式表示调用的参数", "glm4"),
        ("{{ messages }}", "generic"),
        ("{{ tools }}", "generic"),
    ],
)
def test_the_template_shows_the_format(template: str, name: str) -> None:
    form = format_of(template)
    assert form is not None
    assert form.name == name
    assert form.instructs == ("tools" not in template)
    assert format_of(template, "none") is None
    assert format_of(template, "mistral") == FORMATS["mistral"]


# --- reasoning ---


def read(*pieces: str, opened: bool) -> tuple[str, str]:
    """Reasoning and content."""
    reader = ReasoningReader(opened=opened)
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.end()
    return (
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
    )


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\na b\n</think>\n\nYes ", False, ("a b", "Yes ")),
        (" a\n</think>Yes", True, ("a", "Yes")),
        ("just this", False, ("", "just this")),
        ("  <thin", False, ("", "  <thin")),
        ("<think>unfinished </thi", False, ("unfinished </thi", "")),
        ("never closed", True, ("never closed", "")),
        ("so <think>x</think>", False, ("", "so <think>x</think>")),
        ("<think></think>Yes", False, ("", "Yes")),
        ("", True, ("", "")),
    ],
)
def test_reasoning(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert read(text, opened=opened) == expected


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "th", " ", "\n", "a"]), max_size=9
    ),
    opened=st.booleans(),
)
def test_any_split_gives_the_same_reasoning(pieces: list[str], opened: bool) -> None:
    text = "".join(pieces)
    assert read(*pieces, opened=opened) == read(text, opened=opened) == read(*text, opened=opened)


@pytest.mark.parametrize(
    ("thinking", "ids", "count"),
    [
        ("maybe", [7, 1, 2, 8, 3], 4),
        ("maybe", [1, 7, 8], 0),
        ("opened", [1, 8, 3], 2),
        ("opened", [1, 2], 2),
        ("none", [7, 8], 0),
    ],
)
def test_tokens_of_reasoning(thinking: Any, ids: list[int], count: int) -> None:
    whole = ThoughtCounter(Reading(thinking=thinking, marks_of_thought=(7, 8)))
    whole.add(ids)
    single = ThoughtCounter(Reading(thinking=thinking, marks_of_thought=(7, 8)))
    for token in ids:
        single.add([token])
    assert whole.count == single.count == count


def test_whether_an_answer_begins_with_reasoning() -> None:
    assert thinking_of("<think>", "...assistant\n<think>\n", "auto") == "opened"
    assert thinking_of("<think>", "<think>\n\n</think>\n\n", "auto") == "none"
    assert thinking_of("<think>", "assistant\n", "auto") == "maybe"
    assert thinking_of("<think>", "assistant\n", "none") == "none"
    assert thinking_of("", "assistant\n", "auto") == "none"
    assert thinking_of("", "assistant\n", "think") == "maybe"
