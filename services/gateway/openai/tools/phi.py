"""Phi 4: ``<|tool_call|>[{"name": ..., "arguments": ...}]<|/tool_call|>``; ``functools[...]``."""

from typing import Final

from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.reader import Syntax

FORMAT: Final = ToolFormat(
    name="phi4",
    syntax=Syntax(begins=("<|tool_call|>", "functools"), ends=("<|/tool_call|>",)),
    seen_in=("<|tool_call|>", "<|tool|>", "functools["),
    head='[{{"name": {name}, "arguments": ',
    tail="}]<|/tool_call|>",
)
