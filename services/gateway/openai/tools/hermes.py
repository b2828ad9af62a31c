"""Hermes, Qwen and many others: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``."""

from typing import Final

from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.reader import Syntax

SYNTAX: Final = Syntax(begins=("<tool_call>",), ends=("</tool_call>",))
FORMAT: Final = ToolFormat(
    name="hermes",
    syntax=SYNTAX,
    seen_in=("<tool_call>",),
    head='\n{{"name": {name}, "arguments": ',
    tail="}\n</tool_call>",
)
