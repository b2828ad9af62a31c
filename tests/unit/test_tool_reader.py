"""Calls of tools in the text of answers, whatever pieces it comes in."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part
from services.gateway.openai.tools.formats import FORMATS
from services.gateway.openai.tools.qwen_coder import FunctionCall
from services.gateway.openai.tools.reader import CallReader, Syntax

NAMES = frozenset({"weather", "add"})
Read = tuple[str, list[tuple[str, str]]]


def joined(parts: Sequence[Part]) -> Read:
    """The content, and each call's name and arguments."""
    content, calls = "", list[tuple[str, str]]()
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, CallBegun):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            name, arguments = calls[part.index]
            calls[part.index] = (name, arguments + part.text)
    return content, calls


def read(syntax: Syntax, *pieces: str, most: int = 99) -> Read:
    reader = CallReader(syntax, names=NAMES, most=most)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return joined([*parts, *reader.end()])


def syntax_of(name: str) -> Syntax:
    return Syntax(bare=True) if name == "forced" else FORMATS[name].syntax


W = ("weather", '{"city": "Paris"}')
A = ("add", '{"a": 1, "b": [2, {"c": "}]"}]}')
WEATHER, ADD = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in (W, A))
OPEN, CLOSE = "<tool_call>", "</tool_call>"
XML = "<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>"
XML_ADD = (
    '<function=add><parameter=a>1</parameter><parameter=b>[2, {"c": "}]"}]</parameter></function>'
)
CASES: list[tuple[str, str, Read]] = [
    ("hermes", f"ok\n{OPEN}\n{WEATHER}\n{CLOSE}", ("ok", [W])),
    ("hermes", f"{OPEN}{WEATHER}{CLOSE}\n{OPEN}{ADD}{CLOSE} done", ("done", [W, A])),
    ("hermes", f'{OPEN}{{"arguments": {A[1]}, "name": "add"}}{CLOSE}', ("", [A])),
    ("hermes", f'{OPEN}{{"name": "weather"}}{CLOSE}', ("", [("weather", "{}")])),
    (
        "hermes",
        f'{OPEN}{{"name": "f", "arguments": "{{\\"x\\": 1}}"}}',
        ("", [("f", '{"x": 1}')]),
    ),
    ("hermes", f"{OPEN}{WEATHER[:40]}", ("", [("weather", W[1][:7])])),
    ("hermes", f"{OPEN}{WEATHER[:25]}", (f"{OPEN}{WEATHER[:25]}", [])),
    ("hermes", f"a {OPEN}oops{CLOSE} b", (f"a {OPEN}oops{CLOSE} b", [])),
    ("hermes", "a < b <tool_ca", ("a < b <tool_ca", [])),
    ("hermes", WEATHER, (WEATHER, [])),
    ("hermes", f"{OPEN}{WEATHER[:-1]} oops}}{CLOSE} b", ("b", [W])),
    ("hermes", f"{OPEN}{WEATHER}{CLOSE}\n\nso be it ", ("so be it ", [W])),
    ("generic", f"  {WEATHER}", ("", [W])),
    ("generic", f"Well: {OPEN}{ADD}{CLOSE}", ("Well:", [A])),
    ("generic", '{"city": "Paris"}', ('{"city": "Paris"}', [])),
    ("generic", '{"name": "nobody", "arguments": {}}', ('{"name": "nobody", "arguments": {}}', [])),
    ("llama3", f"{WEATHER.replace('arguments', 'parameters')}; {ADD}", ("", [W, A])),
    ("llama3", f'<|python_tag|>{{"type": "function", {WEATHER[1:]}', ("", [W])),
    ("llama3", '[1, {"name": 2}]', ('[1, {"name": 2}]', [])),
    ("llama3", "Hello {world}", ("Hello {world}", [])),
    ("mistral", f'[TOOL_CALLS] [{WEATHER[:-1]}, "id": "x"}}, {ADD}]', ("", [W, A])),
    (
        "mistral",
        f"[TOOL_CALLS]weather[ARGS]{W[1]}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{A[1]}",
        ("", [W, A]),
    ),
    ("mistral", "see [1] and [TOOL", ("see [1] and [TOOL", [])),
    ("phi4", f"<|tool_call|>[{WEATHER}]<|/tool_call|>", ("", [W])),
    ("phi4", f"functools[{ADD}]", ("", [A])),
    (
        "gemma",
        "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>",
        ("", [W]),
    ),
    ("gemma", 'hi <|tool_call>call:add{a:1,b:[2,{c:<|"|>}]<|"|>}]}<tool_call|>', ("hi", [A])),
    ("gemma", "<start_function_call>call:no", ("<start_function_call>call:no", [])),
    ("qwen3_coder", f"ok\n{OPEN}\n{XML}\n{CLOSE}", ("ok", [W])),
    ("qwen3_coder", f"{OPEN}{XML}{CLOSE}\n{OPEN}\n{XML_ADD}{CLOSE} done", ("done", [W, A])),
    ("qwen3_coder", f"{OPEN}<function=weather></function>{CLOSE}", ("", [("weather", "{}")])),
    ("qwen3_coder", f"{OPEN}\n{WEATHER}\n{CLOSE}", ("", [W])),
    ("qwen3_coder", f"{OPEN}{XML[:40]}", (f"{OPEN}{XML[:40]}", [])),
    (
        "qwen3_coder",
        f"a {OPEN}<function=f> oops{CLOSE} b",
        (f"a {OPEN}<function=f> oops{CLOSE} b", []),
    ),
    (
        "qwen3_coder",
        f"{OPEN}<function=f><parameter=x>a</function>{CLOSE}\n</parameter></function>{CLOSE}",
        ("", [("f", json.dumps({"x": f"a</function>{CLOSE}"}))]),
    ),
    ("glm4", f"weather\n{W[1]}", ("", [W])),
    ("glm4", f"\nweather  \n\n{W[1]}\nadd\n{A[1]}\n", ("", [W, A])),
    ("glm4", f"weather\n{W[1]}\nwell, yes", ("well, yes", [W])),
    ("glm4", f"weather\n{W[1][:9]}", ("", [("weather", W[1][:9])])),
    ("glm4", "\nweather is\n{fine}", ("\nweather is\n{fine}", [])),
    ("glm4", "weather\nis fine", ("weather\nis fine", [])),
    ("glm4", "addend\n{}", ("addend\n{}", [])),
    ("glm4", f"I say:\nweather\n{W[1]}", (f"I say:\nweather\n{W[1]}", [])),
    ("glm4", "add", ("add", [])),
    ("glm4", "{}", ("{}", [])),
    ("forced", WEATHER, ("", [W])),
    ("forced", f"[{WEATHER}, {ADD}]", ("", [W, A])),
]
PIECES = [
    *(text for _, text, _ in CASES),
    *(text[: len(text) // 2] for _, text, _ in CASES),
    *(OPEN, CLOSE, "[TOOL_CALLS]", "[ARGS]", "call:", "<escape>", "<|python_tag|>"),
    *(*'{}[]",;:x', " ", "\n", "a b", '{"name"'),
]
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8), lambda leaf: st.lists(leaf, max_size=3)
)


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_what_is_read(name: str, text: str, expected: Read) -> None:
    assert read(syntax_of(name), text) == expected
    assert read(syntax_of(name), *text) == expected


SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": ["integer", "string"]},
        "color": {"$ref": "#/$defs/color"},
        "on": {"type": "boolean"},
    },
    "$defs": {"color": {"enum": ["1", "red"]}},
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "null", "null"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", " two\n\nlines ", " two\n\nlines "),
        ("maybe", "12", "12"),
        ("maybe", "null", None),
        ("count", "12", 12),
        ("count", "a few", "a few"),
        ("color", "1", "1"),
        ("on", "True", True),
        ("on", "maybe", "maybe"),
        ("other", "1.5", 1.5),
        ("other", "NaN", "NaN"),
    ],
)
def test_bare_values_have_the_types_of_the_schema(key: str, text: str, value: object) -> None:
    call = FunctionCall({"f": SCHEMA})
    told = "".join(
        map(call.feed, f"<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>")
    )
    assert json.loads(told) == {key: value}
    assert type(json.loads(told)[key]) is type(value)


@pytest.mark.parametrize("name", [*FORMATS, "forced"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same(name: str, data: st.DataObject) -> None:
    """Texts made of what formats consist of, cut anywhere."""
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    cut = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    syntax = syntax_of(name)
    assert read(syntax, *cut) == read(syntax, text) == read(syntax, *text)


@given(arguments=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_arguments_of_any_kind_are_told_as_they_are(arguments: dict[str, Any]) -> None:
    call = json.dumps({"name": "add", "arguments": arguments})
    told = read(syntax_of("hermes"), f"{OPEN}{call}{CLOSE}")
    assert told == ("", [("add", json.dumps(arguments))])


def test_further_calls_are_left_out() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert read(syntax_of("hermes"), call + call, most=1) == ("", [("add", "{}")])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(syntax_of("hermes"), names=NAMES)
    assert reader.feed('<tool_call>{"name": "add", "arguments": {"a') == [
        CallBegun(index=0, name="add"),
        CallArguments(index=0, text='{"a'),
    ]
