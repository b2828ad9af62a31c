"""GLM-4's and GLM-Z1's calls, which begin with the line of a function's name."""

from pathlib import Path

import pytest

from services.decode_worker.constraints.grammar import Grammar
from services.gateway.openai.tools.fields import Tool
from services.gateway.openai.tools.formats import FORMATS, format_of
from services.gateway.openai.tools.grammar import strict_lark
from tests.support.constraints import accepts as follows
from tests.support.constraints import vocabulary
from tests.support.tokenizers import byte_level

TEMPLATE = (Path(__file__).parents[1] / "data/glm_z1_0414.jinja").read_text()
TOKENIZER = byte_level(("<end>",))
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def tool(name: str, *, strict: bool) -> Tool:
    function = {"name": name, "parameters": SCHEMA, "strict": strict}
    return Tool.model_validate({"type": "function", "function": function})


STRICT_TOOLS = [tool("add", strict=True), tool("adder", strict=False)]


def accepts(lark: str, text: str) -> bool:
    matcher = vocabulary(TOKENIZER, "<end>").compile(Grammar(kind="lark", text=lark), quick=False)
    assert not matcher.error
    return follows(matcher, TOKENIZER.encode(text).ids)


def test_the_template_shows_the_format() -> None:
    assert format_of(TEMPLATE) == FORMATS["glm4"]
    without_thoughts = TEMPLATE.replace("\n<think>", "")
    assert format_of(without_thoughts) == FORMATS["glm4"]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('add\n{"x": 1}', True),
        ('adder\n{"y": [{}]}', True),
        ("\nadd it up\nall of it", True),
        ("add, then", True),
        ("", True),
        ('add\n{"x": "1"}', False),
        ('add\n{"x": 1} more', False),
        ("add\nit up", False),
        ("\nadd \n{}", False),
    ],
)
def test_a_call_that_a_name_begins_follows_its_schema_and_a_text_is_free(
    text: str, fits: bool
) -> None:
    lark = strict_lark(FORMATS["glm4"], STRICT_TOOLS, marks=[], content=None, several=False)
    assert accepts(lark, text) == fits


def test_an_answer_with_a_schema_may_be_a_call_instead() -> None:
    content = '{"type": "object", "properties": {"z": {"const": 1}}, "required": ["z"]}'
    lark = strict_lark(FORMATS["glm4"], STRICT_TOOLS, marks=[], content=content, several=False)
    texts = ['{"z": 1}', 'add\n{"x": 1}', "add", "so"]
    assert [accepts(lark, text) for text in texts] == [True, True, False, False]
