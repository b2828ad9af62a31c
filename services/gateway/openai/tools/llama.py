"""Llama 3: an answer that is ``{"name": ..., "parameters": ...}``, or more of them behind
``<|python_tag|>`` with semicolons between."""

from typing import Final

from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.reader import Syntax

FORMAT: Final = ToolFormat(
    name="llama3",
    syntax=Syntax(begins=("<|python_tag|>",), bare=True),
    seen_in=("<|python_tag|>", '{"name": function name, "parameters":', "<|eom_id|>"),
    head='{{"name": {name}, "parameters": ',
)
