"""Tools as a chat template looks for them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

_JOINS_DESCRIPTION: Final = re.compile(r"[+~]\s*\w+\.description|\.description\s*[+~]")
"""A template that puts descriptions into its text fails for a tool without one: gpt-oss'."""
_OF_A_MESSAGE: Final = re.compile(r"""message(\.tools|\[['"]tools['"]\])""")
"""A template that looks for the tools in the system's message: Phi-4-mini's."""
_SYSTEM: Final = "You are a helpful assistant with some tools."
"""Where the client says nothing, as the model was taught."""
_Message = Mapping[str, Any]
_Tools = Sequence[Mapping[str, Any]]


def with_descriptions(tools: _Tools, template: str) -> list[Mapping[str, Any]]:
    """The tools, each with a description where the template needs one."""
    if _JOINS_DESCRIPTION.search(template) is None:
        return list(tools)
    return [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]


def with_tools(messages: Sequence[_Message], tools: _Tools, template: str) -> list[_Message]:
    """The messages, with the tools as text in the system's, where the template looks there."""
    found = list(messages)
    if not tools or _OF_A_MESSAGE.search(template) is None:
        return found
    if not found or found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": _SYSTEM})
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**found[0], "tools": functions}, *found[1:]]
